"""What a rank holds between steps, in bytes: of engines that keep plain tensors (engine/parts.py)."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from swin_moe.engine.parts import Parts, local_tensor


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors' storages, each once."""
    storages = {s._cdata: s.nbytes() for t in tensors for s in [local_tensor(t).untyped_storage()]}
    return sum(storages.values())


def held_tensors(engine: Any) -> dict[str, list[Tensor]]:
    """Returns class -> tensors: parameters (with masters, copies and buffers), optimizer, averages.

    engine: Of torch's optimizers or FairScale's.
    """
    parts = engine.parts
    states = [t for state in parts.states.values() for t in state.values() if isinstance(t, Tensor)]
    return {
        "parameters": [
            *engine.local_model.parameters(),
            *engine.local_model.buffers(),
            *(p.leaf for p in parts.values()),
            *(() if parts.copies is None else parts.copies.copies.values()),
        ],
        "optimizer": states,
        "averages": [] if engine.ema is None else list(engine.ema.average.values()),
    }


def held_bytes(engine: Any) -> dict[str, int]:
    """Returns class -> bytes, of what there is; {} of an engine that keeps its tensors otherwise (DeepSpeed's)."""
    if not isinstance(getattr(engine, "parts", None), Parts):
        return {}
    return {name: size for name, tensors in held_tensors(engine).items() if (size := bytes_of(tensors))}

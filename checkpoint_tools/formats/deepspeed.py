"""DeepSpeed ZeRO 1, 2 and 3 directories: parameters from the float32 masters, Adam's moments, read only.

DeepSpeed's own loader and zero_to_fp32 cannot read what it saves of experts that are not its own; but every rank's file
of optimizer states holds the flat masters of that rank's part, from which all of it can be put together
(deepspeedai/DeepSpeed, runtime/zero/stage_1_and_2.py:state_dict, stage3.py:_rigid_state_dict; version 0.19.8).

Stages 1, 2: each group of parameters is one flat buffer, cut in `partition_count` parts; `param_slice_mappings` says
where each fragment of a parameter lies. Stage 3: each parameter is cut by itself, in parts of ceil(numel /
partition_count).
A group of experts is cut over the ranks that hold the same ones only: partition_count = world / ranks the experts are
spread over, and rank r holds share r % ranks of them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint_tools.files.record_file import OpenFiles, TensorRecord
from checkpoint_tools.files.torch_file import TorchFile
from checkpoint_tools.formats.infer import given_sizes, infer_model
from checkpoint_tools.formats.official.state import whole_number
from checkpoint_tools.formats.plain_read import sizes_of
from checkpoint_tools.formats.rules import FROM_OFFICIAL, check_ours, to_ours
from checkpoint_tools.sources.assembled import AssembledSource, Leaf, Part
from checkpoint_tools.sources.base import Options, Source
from swin_moe.checkpoint.boxes import row_strides
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.layout import Chunk, boxes_of_range

_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_00_optim_states\.pt")
_INERT = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)


class Fragment(NamedTuple):
    """Elements [start, stop) of a rank's part of a parameter, at `at` of that rank's flat buffer of group `group`."""

    rank: int
    group: int
    at: int
    start: int
    stop: int


def detect(path: Path) -> bool:
    """See formats/__init__.py: the directory that holds `latest`, or that of one tag."""
    return path.is_dir() and _directory(path) is not None


def _directory(path: Path) -> Path | None:
    """Returns the directory of a tag that holds optimizer states, or None."""
    latest = path / "latest"
    if latest.is_file() and latest.stat().st_size < 4096:
        tag = latest.read_text(errors="replace").strip()
        if Path(tag).name == tag and (path / tag).is_dir():
            path = path / tag
    has = any(entry.name.endswith(("_rank_00_optim_states.pt", "_rank_00_model_states.pt")) for entry in path.iterdir())
    return path if has else None


def open_deepspeed(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the directory `path`; see formats/__init__.py."""
    directory = _directory(path) if path.is_dir() else None
    if directory is None:
        raise CheckpointError(f"{path}: holds neither `latest` nor the model states of DeepSpeed")
    if any(directory.glob("*_expert_*_model_states.pt")):
        raise CheckpointError(f"{path}: holds experts of deepspeed.moe, which are no experts of a Swin network")
    try:
        reading = _Reading(directory)
        parts = _parts(reading, path)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CorruptionError(f"{directory}: is no checkpoint of ZeRO 1, 2 or 3 ({error!r})") from None
    shapes = sizes_of(parts)
    for name, shape in shapes.items():
        rows = shapes.get(f"{name.rpartition('/')[2].partition('.experts.')[0]}.router.weight")
        if is_expert_tensor(name) and rows and shape[0] != rows[0]:
            raise CheckpointError(f"{path}: tensor {name}: {shape[0]} of {rows[0]} experts are here, the rest is lost")
    inferred = infer_model(path, {name: shape for name, shape in shapes.items() if "/" not in name})
    config = {"model": inferred | (given_sizes(options.extra) if inferred else {})}
    provenance = {"source": {"format": "deepspeed", "stage": reading.stage, "ranks": len(reading.optim)}}
    return AssembledSource("deepspeed", path, parts, options, step=reading.step, config=config, provenance=provenance)


def _parts(reading: "_Reading", path: Path) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for group, shapes in enumerate(reading.groups):
        for foreign, shape in shapes.items():
            place = to_ours(foreign, FROM_OFFICIAL)
            if place is not None:
                name = check_ours(place.name, foreign, path)
                parts |= reading.parts_of(name, foreign, group, shape)
    return parts | reading.untrained(parts, path)


class _Reading:
    """The files of a directory: of optimizer states by rank, and the model states of rank 0.

    Raises:
        CheckpointError: A file is missing, or of a kind that has no masters.
        CorruptionError: Files contradict each other.
    """

    def __init__(self, directory: Path) -> None:
        files, found = OpenFiles(), {}
        for entry in directory.iterdir():
            match = _OPTIM.fullmatch(entry.name)
            if match:
                found[int(match[1])] = entry
        if not found:
            raise CheckpointError(f"{directory}: has no ZeRO optimizer states; without them, a rank's experts are lost")
        names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
        model = next((directory / name for name in names if (directory / name).is_file()), None)
        if model is None:
            raise CorruptionError(f"{directory}: has no model states")
        self.model = TorchFile(model, files, inert=_INERT)
        self.directory = directory
        content = self.model.content
        self.world = content.get("dp_world_size")
        missing = [rank for rank in range(max(self.world or 0, max(found) + 1)) if rank not in found]
        if missing:
            raise CorruptionError(f"{directory}: the optimizer states of rank {missing[0]} are missing")
        self.optim = [TorchFile(found[rank], files, inert=_INERT) for rank in sorted(found)]
        self.states = [file.content["optimizer_state_dict"] for file in self.optim]
        self.stage = int(self.states[0]["zero_stage"].args[0])
        self.groups = [dict(shapes) for shapes in content["param_shapes"]]
        self.step = int(content.get("global_steps", 0))
        self.counts = [self._count(group) for group in range(len(self.groups))]
        self._places: dict[tuple[int, int], dict[str, list[tuple[int, int, int]]]] = {}

    def _count(self, group: int) -> int:
        """Returns how many parts a group is cut in."""
        state = self.states[0]
        groups = state.get("ds_zero_partition_groups")
        count = groups[group]["partition_count"] if groups else state["partition_count"]
        count = count[group] if isinstance(count, list) else count
        if type(count) is not int or count < 1 or len(self.states) % count:
            raise ValueError(f"partition_count {count}")
        return count

    def flat(self, rank: int, group: int, kind: str) -> TensorRecord:
        """Returns a rank's flat buffer of a group: its masters ("") or moments of a kind."""
        state = self.states[rank]
        if not kind:
            return state["single_partition_of_fp32_groups" if self.stage < 3 else "fp32_flat_groups"][group]
        return state["base_optimizer_state" if self.stage < 3 else "optimizer_state_dict"]["state"][group][kind]

    def fragments(self, name: str, group: int, share: int, numel: int) -> Iterator[Fragment]:
        """Yields the fragments of one share of a parameter: of the ranks that hold the same experts, or of all."""
        if (group, share) not in self._places:
            self._places[group, share] = self._find_places(group, share)
        start = 0
        for rank, at, length in self._places[group, share].get(name, ()):
            yield Fragment(rank, group, at, start, start + length)
            start += length
        if start != numel:
            raise CorruptionError(f"{self.directory}: tensor {name}: {start} of {numel} elements are here")

    def _find_places(self, group: int, share: int) -> dict[str, list[tuple[int, int, int]]]:
        """Returns parameter -> (rank, first element, elements) of its fragments in the flat buffers of a share."""
        count = self.counts[group]
        found: dict[str, list[tuple[int, int, int]]] = {}
        spread = len(self.states) // count
        if self.stage < 3:
            for rank in range(share, count * spread, spread):
                for name, where in dict(self.states[rank]["param_slice_mappings"][group]).items():
                    found.setdefault(name, []).append((rank, where.state["start"], where.state["numel"]))
            return found
        at = 0
        for name, shape in self.groups[group].items():
            numel = math.prod(shape)
            size = -(-numel // count)
            found[name] = [(part * spread + share, at, max(0, min(size, numel - part * size))) for part in range(count)]
            at += size
        return found

    def parts_of(self, name: str, foreign: str, group: int, shape: Any) -> dict[str, list[Part]]:
        """Returns the parts of a parameter and of its moments."""
        shape, spread = tuple(shape), len(self.states) // self.counts[group]
        if not all(type(n) is int and 0 <= n <= 1 << 62 for n in shape):
            raise ValueError(f"a shape {shape}")
        if spread > 1 and not is_expert_tensor(name):
            raise CorruptionError(f"{self.directory}: tensor {name}: dense, but cut over some ranks only")
        kinds = [key for key, value in self._state(group).items() if key != "step" and isinstance(value, TensorRecord)]
        result: dict[str, list[Part]] = {}
        for kind in ("", *kinds):
            target = f"optim.{kind}/{name}" if kind else name
            result[target] = []
            for share in range(spread):
                for fragment in self.fragments(foreign, group, share, math.prod(shape)):
                    result[target] += self._parts(target, fragment, kind, shape, share)
        return result

    def _state(self, group: int) -> dict[str, Any]:
        state = self.states[0]["base_optimizer_state" if self.stage < 3 else "optimizer_state_dict"]["state"][group]
        self.step = max(self.step, whole_number(state.get("step", 0), self.optim[0]))
        return state

    def _parts(self, name: str, fragment: Fragment, kind: str, shape: tuple[int, ...], share: int) -> Iterator[Part]:
        """Yields the boxes of the tensor that a fragment makes; experts of share s follow those of share s - 1."""
        flat, at = self.flat(fragment.rank, fragment.group, kind), fragment.at
        numel = fragment.stop - fragment.start
        inside = 0 <= fragment.start and 0 <= numel and 0 <= at and at + numel <= flat.shape[0]
        if len(flat.shape) != 1 or not inside:
            raise CorruptionError(f"{self.optim[fragment.rank].path}: tensor {name}: reaches beyond its flat buffer")
        for box in boxes_of_range(shape, fragment.start, fragment.stop):
            offset = (box.offset[0] + share * shape[0], *box.offset[1:]) if shape and share else box.offset
            stride = row_strides(box.size)
            record = replace(flat, offset=flat.offset + at * flat.stride[0], shape=box.size, stride=stride)
            yield Part(Chunk(offset, box.size), (Leaf(self.optim[fragment.rank], record),))
            at += box.numel

    def untrained(self, found: dict[str, list[Part]], path: Path) -> dict[str, list[Part]]:
        """Returns the parameters without optimizer state, from the model states of rank 0.

        Raises:
            CheckpointError: They are of experts on several ranks, or cut in parts, as in stage 3: those are lost.
        """
        result: dict[str, list[Part]] = {}
        spread = max(len(self.states) // count for count in self.counts)
        for foreign, record in self.model.content.get("module", {}).items():
            place = to_ours(str(foreign), FROM_OFFICIAL)
            if place is None or place.name in found or not isinstance(record, TensorRecord):
                continue
            name = check_ours(place.name, foreign, path)
            if self.stage == 3 or (is_expert_tensor(name) and spread > 1):
                raise CheckpointError(
                    f"{path}: tensor {name} is frozen, and DeepSpeed saved a part of it only: the rest is lost"
                )
            result[name] = [Part(Chunk.whole(record.shape), (Leaf(self.model, record),))]
        return result

"""Rank files of the official Swin-MoE loop, and of Tutel's scatter: `<path>.rank<r>`, `.master`, `.global`.

Per epoch every rank writes its whole local model (dense weights, its own experts, optimizer); at the end `.rank<r>` holds
trained experts and `.master`, by rank 0, all else (microsoft/Swin-Transformer, utils_moe.py:save_checkpoint).
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.assembled import AssembledSource, Leaf, Part, join_parts
from checkpoint_tools.expert_files import Layer, expert_parts, layer_sizes
from checkpoint_tools.infer import infer_model
from checkpoint_tools.official_layout import is_buffer
from checkpoint_tools.official_state import model_records, native_config, read_moments, training_state
from checkpoint_tools.official_write import OfficialContent
from checkpoint_tools.publish import publish_files
from checkpoint_tools.record_file import OpenFiles, TensorRecord
from checkpoint_tools.rules import FROM_OFFICIAL, Place, to_ours
from checkpoint_tools.source import Options, Source
from checkpoint_tools.torch_file import TorchFile
from checkpoint_tools.torch_writer import NewTensor, num_bytes, write_torch
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW, is_expert_tensor
from swin_moe.layout import Chunk

Model = dict[str, TensorRecord]


def detect(path: Path) -> bool:
    """See formats/__init__.py: the path is that of the files without its ".rank<r>"."""
    return any(path.with_name(f"{path.name}{end}").is_file() for end in (".rank0", ".global"))


def open_official_moe(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the rank files of `path`; see formats/__init__.py."""
    ranks, master, only = find_files(path)
    files = OpenFiles()
    if only is not None:
        opened, shared = [TorchFile(only, files)], None
    else:
        opened = [TorchFile(rank, files) for rank in ranks]
        shared = TorchFile(master, files) if master is not None else None
    return assemble("official-moe", path, opened, shared, options)


def find_files(path: Path) -> tuple[list[Path], Path | None, Path | None]:
    """Returns (rank files by rank, the .master or None, the .global or None where there are no rank files).

    Raises:
        CheckpointError: A rank file is missing between others, or there is none.
    """
    found: dict[int, Path] = {}
    pattern = re.compile(re.escape(path.name) + r"\.rank(\d{1,6})")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(entry.name)
        if match and str(int(match[1])) == match[1]:
            found[int(match[1])] = entry
    master, single = (path.with_name(f"{path.name}{end}") for end in (".master", ".global"))
    if not found:
        if single.is_file():
            return [], None, single
        raise CheckpointError(f"{path}: there is neither {path.name}.rank0 nor {single.name}")
    missing = [rank for rank in range(max(found) + 1) if rank not in found]
    if missing:
        raise CheckpointError(f"{path}.rank{missing[0]}: is missing, but there is {path.name}.rank{max(found)}")
    return [found[rank] for rank in sorted(found)], master if master.is_file() else None, None


def assemble(form: str, path: Path, ranks: list[TorchFile], shared: TorchFile | None, options: Options) -> Source:
    """Returns the source that the files of all ranks make, with what only `shared` holds.

    Raises:
        CheckpointError: A tensor is missing on some rank, has another shape than its layout says, or experts are lost.
    """
    models = [model_records(file.content, file.path) for file in ranks]
    rest = model_records(shared.content, shared.path) if shared is not None else {}
    leaves = _gather(path, ranks, models, shared, rest)
    shapes = {name: found[0].record.shape for name, found in leaves.items() if not is_expert_tensor(name)}
    layers = {
        name.removesuffix(".experts.fc1_weight"): layer_sizes(
            path, name.removesuffix(".experts.fc1_weight"), shapes, found[0].record.shape, len(ranks)
        )
        for name, found in leaves.items()
        if name.endswith(".experts.fc1_weight")
    }
    parts = _parts(path, leaves, layers)
    inferred = infer_model({name: _shape(part) for name, part in parts.items()}, _buffers(models[0] | rest))
    family = inferred.get("name", "swin_moe")
    moments = []
    for file, model in zip(ranks, models):
        moments.append(read_moments(file.content, file, {n: r.shape for n, r in model.items()}, family=family))
    if any((found is None) != (moments[0] is None) for found in moments):
        raise CheckpointError(f"{path}: some rank files hold an optimizer and some do not")
    if moments[0] is not None:
        states = [
            {f"optim.{kind}/{name}": r for kind, named in found.tensors.items() for name, r in named.items()}
            for found in moments
        ]
        parts |= _parts(path, _gather(path, ranks, states, None, {}), layers)
        steps = sorted({found.step for found in moments})
        if len(steps) > 1:
            options.report(f"{path}: the ranks did {steps} optimizer steps; the largest is kept")
    content = ranks[0].content
    config = native_config(content, inferred, ranks[0].path, options, world=len(ranks))
    step = max(found.step for found in moments) if moments[0] is not None else 0
    newest = max((m for m in moments if m is not None), key=lambda m: m.step, default=None)
    state = training_state(content, newest, config, ranks[0].path)
    provenance = {"source": {"format": form, "ranks": len(ranks)}}
    return AssembledSource(
        form, path, parts, options, step=step, state=state, config=config, provenance=provenance
    )


def _gather(
    path: Path, ranks: list[TorchFile], models: list[Model], shared: TorchFile | None, rest: Model
) -> dict[str, list[Leaf]]:
    """Returns our name -> one leaf per rank, or a single one for what only the shared file holds.

    An expert tensor that only the shared file holds is the frozen second bias of rank 0: official ranks load it as
    their own, so it stands for every rank.
    """
    leaves: dict[str, list[Leaf]] = {}
    for file, model in zip(ranks, models):
        for official, record in model.items():
            name = _our_name(official)
            if name is not None:
                leaves.setdefault(name, []).append(Leaf(file, record))
    for official, record in rest.items():
        name = _our_name(official)
        if name is not None and name not in leaves:
            copies = len(ranks) if is_expert_tensor(name) else 1
            leaves[name] = [Leaf(shared, record)] * copies
    for name, found in leaves.items():
        if len(found) != len(ranks) and found[0].file is not shared:
            holders = {leaf.file.path for leaf in found}
            other = next(file.path for file in ranks if file.path not in holders)
            raise CheckpointError(f"{other}: holds no tensor {name}, which {found[0].file.path.name} holds")
    return leaves


def _our_name(official: str) -> str | None:
    """Returns our name of an official tensor or of its optimizer state; None for buffers."""
    kind, slash, name = official.rpartition("/")
    place = to_ours(name, FROM_OFFICIAL)
    return None if place is None else f"{kind}{slash}{place.name}"


def _parts(path: Path, leaves: Mapping[str, list[Leaf]], layers: Mapping[str, Layer]) -> dict[str, list[Part]]:
    experts = {name: found for name, found in leaves.items() if is_expert_tensor(name)}
    dense = ((Place(name), tuple(found)) for name, found in leaves.items() if name not in experts)
    parts = join_parts(path, dense)
    for name, found in experts.items():
        layer = layers.get(name.rpartition("/")[2].partition(".experts.")[0])
        if layer is None:
            raise CheckpointError(f"{path}: tensor {name} belongs to experts without fc1_weight")
        parts[name] = expert_parts(name, found, layer)
    return parts


def _shape(parts: list[Part]) -> tuple[int, ...]:
    boxes = [part.box for part in parts]
    return tuple(max(ends) for ends in zip(*(map(sum, zip(box.offset, box.size)) for box in boxes)))


def _buffers(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: record.shape for name, record in model.items() if is_buffer(name)}


def write_official_moe(source: Source, path: Path, options: Options) -> None:
    """Writes rank files; see formats/__init__.py.

    --world: ranks, default as many as experts. --set form=epoch (each rank's whole model and optimizer; the default
    where there is optimizer state), form=final (experts, and `.master`) or form=global (one file, SAVE_MASTER).
    --set counts=no: without `_num_global_experts`, as the files released in 2022.
    """
    contents = _contents(source, options)
    total = sum(num_bytes(make()) for make in contents.values())

    def write(staging: Path) -> None:
        for number, (ending, make) in enumerate(contents.items()):
            if number % options.comm.size == options.comm.rank:
                target = staging / f"{path.name}{ending}"
                write_torch(target, make(), box_bytes=options.box_bytes, progress=options.progress)

    publish_files(path, total, write, comm=options.comm)


def plan_official_moe(source: Source, path: Path, options: Options) -> dict[str, int]:
    """Returns the files that write_official_moe would make, with about their bytes."""
    return {f"{path.name}{ending}": num_bytes(make()) for ending, make in _contents(source, options).items()}


def _contents(source: Source, options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns what makes the content of each file, by its ending."""
    experts = [t.shape[0] for name, t in source.tensors.items() if name.endswith(".experts.fc1_weight")]
    world = options.world or max(experts, default=1)
    content = OfficialContent(source, options, world=world)
    form = options.extra.get("form", "epoch" if content.kinds else "final")
    if form == "epoch":
        return {f".rank{r}": lambda r=r: {"model": content.model(r), **content.training(r)} for r in range(world)}
    if form == "global":
        if world > 1 and experts:
            raise CheckpointError("--set form=global: one file holds the experts of one rank only; give --world 1")
        return {".global": lambda: {"model": content.model(0), **content.training(0)}}
    if form != "final":
        raise CheckpointError(f"--set form must be epoch, final or global, got {form!r}")
    _check_frozen(content)
    trained = content.trained_experts(0)

    def part(rank: int, *, own: bool) -> dict[str, Any]:
        return {"model": {n: t for n, t in content.model(rank).items() if (n in trained) == own}}

    ranks = {f".rank{r}": lambda r=r: part(r, own=True) for r in range(world)}
    return {".master": lambda: part(0, own=False), **ranks}


def _check_frozen(content: OfficialContent) -> None:
    """Raises CheckpointError where ranks would lose their frozen second biases: the final form keeps rank 0's."""
    if content.world == 1 or content.network.get("mlp_fc2_bias", True):
        return
    for name in content.names:
        if is_expert_tensor(name) and name.endswith(".fc2_bias"):
            first = _load(content.tensor(name, 0))
            if any(not np.array_equal(first, _load(content.tensor(name, r))) for r in range(1, content.world)):
                raise CheckpointError(
                    f"{content.source.path}: tensor {name} differs between experts, but the final form keeps the frozen "
                    f"biases of rank 0 alone; use --set form=epoch"
                )


def _load(tensor: NewTensor) -> np.ndarray:
    data = np.empty(tensor.shape, RAW[DTYPE_BYTES[tensor.dtype]])
    tensor.fill(Chunk.whole(tensor.shape), data)
    return data

"""Rank files of the official Swin-MoE loop, and of Tutel's scatter: `<path>.rank<r>`, `.master`, `.global`.

Per epoch every rank writes its whole local model (dense weights, its own experts, optimizer); at the end `.rank<r>`
holds trained experts and `.master`, by rank 0, all else (microsoft/Swin-Transformer, utils_moe.py:save_checkpoint).
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.files.publish import publish_files
from checkpoint_tools.files.record_file import OpenFiles, RecordFile
from checkpoint_tools.files.torch_writer import NewTensor, num_bytes, write_torch
from checkpoint_tools.formats.official.read import assemble
from checkpoint_tools.formats.official.write import OfficialContent
from checkpoint_tools.formats.state_dict import open_file
from checkpoint_tools.sources.base import Options, Source
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW, is_expert_tensor
from swin_moe.layout import Chunk


def detect(path: Path) -> bool:
    """See formats/__init__.py: the path is that of the files without its ".rank<r>"."""
    return bool(path.name) and any(path.with_name(f"{path.name}{end}").is_file() for end in (".rank0", ".global"))


def open_official_moe(path: Path, options: Options) -> Source:
    """Returns the checkpoint in the rank files of `path`; see formats/__init__.py."""
    return assemble("official-moe", path, *open_files(path), options)


def open_files(path: Path) -> tuple[list[RecordFile], RecordFile | None]:
    """Returns the opened files of all ranks, and the `.master` where there is one."""
    ranks, master, only = find_files(path)
    files = OpenFiles()
    opened: list[RecordFile] = [open_file(rank, files) for rank in ([only] if only is not None else ranks)]
    return opened, None if master is None else open_file(master, files)


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


def write_official_moe(source: Source, path: Path, options: Options, *, optimizer: bool = True) -> None:
    """Writes rank files; see formats/__init__.py.

    --world: ranks, default as many as experts. --set form=epoch (each rank's whole model and optimizer; the default
    where there is optimizer state), form=final (experts, and `.master`) or form=global (one file, SAVE_MASTER).
    --set counts=no: without `_num_global_experts`, as the files released in 2022.
    """
    contents = _contents(source, options, optimizer=optimizer)
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


def _contents(source: Source, options: Options, *, optimizer: bool = True) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns what makes the content of each file, by its ending."""
    experts = [t.shape[0] for name, t in source.tensors.items() if name.endswith(".experts.fc1_weight")]
    world = options.world or max(experts, default=1)
    content = OfficialContent(source, options, world=world, optimizer=optimizer)
    form = options.extra.get("form", "epoch" if content.kinds else "final")
    if form == "epoch":
        return {f".rank{r}": partial(_of_rank, content, r) for r in range(world)}
    if form == "global":
        if world > 1 and experts:
            raise CheckpointError("--set form=global: one file holds the experts of one rank only; give --world 1")
        return {".global": partial(_of_rank, content, 0)}
    if form != "final":
        raise CheckpointError(f"--set form must be epoch, final or global, got {form!r}")
    _check_frozen(content)
    trained = content.trained_experts(0)

    def part(rank: int, *, own: bool) -> dict[str, Any]:
        return {"model": {n: t for n, t in content.model(rank).items() if (n in trained) == own}}

    ranks = {f".rank{r}": partial(part, r, own=True) for r in range(world)}
    return {".master": partial(part, 0, own=False), **ranks}


def _of_rank(content: OfficialContent, rank: int) -> dict[str, Any]:
    return {"model": content.model(rank), **content.training(rank)}


def _check_frozen(content: OfficialContent) -> None:
    """Raises CheckpointError where ranks would lose their frozen second biases: the final form keeps rank 0's."""
    if content.world == 1 or content.network.get("mlp_fc2_bias", True):
        return
    for name in content.names:
        if is_expert_tensor(name) and name.endswith(".fc2_bias"):
            first = _load(content.tensor(name, 0))
            if any(not np.array_equal(first, _load(content.tensor(name, r))) for r in range(1, content.world)):
                raise CheckpointError(
                    f"{content.source.path}: tensor {name} differs between experts, but the final form keeps the "
                    f"frozen biases of rank 0 alone; use --set form=epoch"
                )


def _load(tensor: NewTensor) -> np.ndarray:
    data = np.empty(tensor.shape, RAW[DTYPE_BYTES[tensor.dtype]])
    tensor.fill(Chunk.whole(tensor.shape), data)
    return data

"""`inspect PATH`: tensors, experts, files, step, provenance of a checkpoint of any format. Reads no tensor data."""

import argparse
import json
from pathlib import Path
from typing import Any

from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options, Source, split_kind
from checkpoint_tools.verbs.arguments import add_format_argument
from checkpoint_tools.verbs.text import format_bytes, table
from swin_moe.checkpoint.pieces import is_expert_tensor

_KINDS = ("weight", "master", "ema", "exp_avg", "exp_avg_sq")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("path", type=Path, help="a checkpoint, or a run for its newest one")
    add_format_argument(parser)
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Prints the description on rank 0."""
    with open_source(arguments.path, options, arguments.format) as source:
        content = describe(source)
    if options.comm.rank == 0:
        print(json.dumps(content, indent=1, sort_keys=True) if arguments.json else render(content))
    return 0


def describe(source: Source) -> dict[str, Any]:
    """Returns all that is known without reading data, as JSON."""
    parameters = [n for n in source.tensors if split_kind(n)[0] == "weight"]
    tensors: dict[str, dict[str, Any]] = {
        name: {
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "bytes": tensor.num_bytes,
            "chunks": source.num_chunks(name),
            "experts": num_experts(source, name),
        }
        for name, tensor in sorted(source.tensors.items())
    }
    totals = {
        "tensors": len(tensors),
        "chunks": sum(tensor["chunks"] for tensor in tensors.values()),
        "bytes": sum(tensor["bytes"] for tensor in tensors.values()),
        "parameters": sum(source.tensors[name].num_elements for name in parameters),
        "expert_parameters": sum(source.tensors[n].num_elements for n in parameters if is_expert_tensor(n)),
        "experts": max((tensor["experts"] for tensor in tensors.values()), default=0),
        "file_bytes": sum(path.stat().st_size for path in source.files),
    }
    files = {str(path): path.stat().st_size for path in source.files}
    return {
        "path": str(source.path),
        "format": source.format,
        "step": source.step,
        "totals": totals,
        "files": files,
        "tensors": tensors,
        "state": source.state,
        "config": source.config,
        "provenance": source.provenance,
    }


def num_experts(source: Source, name: str) -> int:
    """Returns how many experts a tensor holds; 0 for a dense one."""
    shape = source.tensors[name].shape
    return shape[0] if is_expert_tensor(name) and shape else 0


def render(content: dict[str, Any]) -> str:
    """Returns the description as text: one row per parameter, with what else is stored for it."""
    totals, tensors = content["totals"], content["tensors"]
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(split_kind(name)[1], []).append(name)
    rows = []
    for parameter, names in sorted(groups.items()):
        tensor = tensors[parameter if parameter in tensors else names[0]]
        total = sum(tensors[name]["bytes"] for name in names)
        stored = [split_kind(name)[0] for name in names]
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        sizes = tensor["experts"] or "", tensor["chunks"], format_bytes(total)
        rows.append((parameter, shape, tensor["dtype"], *sizes, " ".join(sorted(stored, key=_order))))
    parts = [
        f"{content['path']}: {content['format']}, step {content['step']}",
        f"{totals['tensors']} tensors in {totals['chunks']} chunks, {format_bytes(totals['bytes'])}; "
        f"{totals['parameters']:,} parameters, {totals['expert_parameters']:,} of them in {totals['experts']} experts",
        "",
        table(("tensor", "shape", "dtype", "experts", "chunks", "bytes", "stored"), rows),
        "",
        table(("file", "bytes"), ((Path(name).name, format_bytes(size)) for name, size in content["files"].items())),
    ]
    for key in ("state", "provenance"):
        if content[key]:
            parts += ["", f"{key}: {json.dumps(content[key], sort_keys=True)}"]
    return "\n".join(parts)


def _order(kind: str) -> tuple[int, str]:
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS)), kind

"""`export SRC DST --to safetensors|onnx|torch-export`: weights, or the network, for programs that are not ours."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checkpoint_tools.files.publish import publish_files, tell_new_parent
from checkpoint_tools.formats import open_source
from checkpoint_tools.formats.safetensors import describe
from checkpoint_tools.sources.base import Options, Source, split_kind
from checkpoint_tools.verbs.arguments import add_format_argument
from checkpoint_tools.verbs.text import format_bytes, progress_of
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.checkpoint.plan import encode_header
from swin_moe.layout import boxes_of_range
from swin_moe.registry import lookup

KINDS = {
    "safetensors": "checkpoint_tools.verbs.export:write_safetensors",
    "torch-export": "checkpoint_tools.verbs.export_program:write_program",
    "onnx": "checkpoint_tools.verbs.export_program:write_onnx",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add = parser.add_argument
    add("source", type=Path, help="a checkpoint of any format, or a run for its newest one")
    add("destination", type=Path, help="the file to write; nothing may be there yet")
    add("--to", required=True, choices=sorted(KINDS))
    add_format_argument(parser)
    add("--last", action="store_true", help="the last weights also where the checkpoint has averaged ones (ema/)")
    add(
        "--batch",
        type=int,
        metavar="N",
        help="images per call of an exported network (default: any; 1 where several images share the slots of experts)",
    )


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Writes the file."""
    if options.comm.size > 1:
        raise ValueError("export writes one file; run it without a launcher")
    if arguments.batch is not None and arguments.batch < 1:
        raise ValueError(f"--batch must be >= 1, got {arguments.batch}")
    if arguments.batch is not None and arguments.to == "safetensors":
        raise ValueError(f"--batch {arguments.batch} has no effect on --to safetensors, which holds weights alone")
    with open_source(arguments.source, options, arguments.format) as source:
        stored = exported_names(source, last=arguments.last)
        tell_new_parent(arguments.destination, options.report)
        write = lookup(KINDS, arguments.to, key="--to")
        write(source, stored, arguments.destination, options, arguments.batch or 0)
        averaged = sum(name.startswith("ema/") for name in stored.values())
    options.report(
        f"{arguments.destination}: {arguments.to} of {len(stored)} parameters, {averaged} of them averaged, "
        f"{format_bytes(arguments.destination.stat().st_size)}"
    )
    return 0


def exported_names(source: Source, *, last: bool) -> dict[str, str]:
    """Returns parameter -> the tensor to take for it: its running average where there is one.

    Raises:
        CheckpointError: The source holds no parameters.
    """
    names = {name: name for name in sorted(source.tensors) if split_kind(name)[0] == "weight"}
    if not names:
        raise CheckpointError(f"{source.path}: holds no parameters to export")
    return names if last else {n: f"ema/{n}" if f"ema/{n}" in source.tensors else n for n in names}


def write_safetensors(source: Source, stored: dict[str, str], path: Path, options: Options, batch: int = 1) -> None:
    """Writes one safetensors file of whole tensors under their parameters' names; streams box by box."""
    end, entries = 0, {}
    # Wider elements first, as safetensors aligns them; a stable sort keeps the names' order.
    names = sorted(stored, key=lambda n: -DTYPE_BYTES[source.tensors[stored[n]].dtype])
    for name in names:
        tensor = source.tensors[stored[name]]
        start, end = end, end + tensor.num_bytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = encode_header(entries, describe(source))

    def write(staging: Path) -> None:
        with progress_of(options, end) as advance, open(staging / path.name, "wb") as file:
            file.write(header)
            for name in names:
                for raw in read_parts(source, stored[name], options):
                    file.write(raw)
                    advance(raw.nbytes)

    publish_files(path, len(header) + end, write)


def read_parts(source: Source, name: str, options: Options) -> Iterator[np.ndarray]:
    """Yields a tensor in row-major order as flat raw integers, at most Options.box_bytes at once."""
    tensor = source.tensors[name]
    raw = RAW[DTYPE_BYTES[tensor.dtype]]
    count, step = tensor.num_elements, options.box_bytes // raw.itemsize
    for start in range(0, count, step):
        for box in boxes_of_range(tensor.shape, start, min(start + step, count)):
            part = np.empty(box.size, raw)
            source.read(name, box, part)
            yield part.reshape(-1)

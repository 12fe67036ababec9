"""`convert SRC DST --from F --to F`: any format to any format."""

import argparse
import dataclasses
from pathlib import Path

from checkpoint_tools.files.publish import tell_new_parent
from checkpoint_tools.formats import FORMATS, open_source, write_checkpoint
from checkpoint_tools.formats.settings import check_world
from checkpoint_tools.sources.base import Options, Source
from checkpoint_tools.verbs.arguments import add_format_argument, add_output_arguments, add_settings_argument
from checkpoint_tools.verbs.plan import describe_plan
from checkpoint_tools.verbs.text import format_bytes, progress_of
from swin_moe.checkpoint.communicator import SingleProcess
from swin_moe.checkpoint.errors import CheckpointError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add = parser.add_argument
    add("source", type=Path, help="a checkpoint; for rank files the path without .rank0")
    add("destination", type=Path, help="what to write; nothing may be there yet")
    add_format_argument(parser)
    add("--to", required=True, type=_to, choices=sorted(name for name, row in FORMATS.items() if row.write))
    add("--world", type=int, default=0, help="rank files to write, for formats that have them")
    add_settings_argument(parser)
    add_output_arguments(parser)


def _to(name: str) -> str:
    """Returns the name of a format; raises argparse.ArgumentTypeError for what another verb writes."""
    from checkpoint_tools.verbs.export import KINDS

    if name in KINDS and name not in FORMATS:
        raise argparse.ArgumentTypeError(f"{name} is of another verb: swin-moe checkpoint export SRC DST --to {name}")
    return name


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Converts, or says what that would do."""
    check_world(arguments.to, arguments.world)
    with open_source(arguments.source, options, arguments.format) as source:
        write_or_plan(source, arguments.destination, options, arguments.to, dry_run=arguments.dry_run)
    return 0


def write_or_plan(source: Source, path: Path, options: Options, to: str = "native", *, dry_run: bool) -> None:
    """Writes a source as a new checkpoint, with a progress bar, or prints what that would read and write."""
    if dry_run:
        options.report(describe_plan(source, path, options, to))
        return
    tell_new_parent(path, options.report)
    total = sum(tensor.num_bytes for tensor in source.tensors.values())
    with progress_of(options, total // options.comm.size) as advance:
        write_checkpoint(source, path, dataclasses.replace(options, progress=advance), to)
    options.report(f"{path}: {to}, {_describe_written(path, options, to)}, from {source.described}")


def _describe_written(path: Path, options: Options, to: str) -> str:
    """Returns how many tensors and bytes the output has, by its headers: it may hold less than the source."""
    if options.comm.rank:
        return ""
    quiet = dataclasses.replace(options, report=lambda text: None, extra={}, comm=SingleProcess(), verify=False)
    try:
        with open_source(path, quiet, to) as written:
            total = sum(tensor.num_bytes for tensor in written.tensors.values())
            return f"{len(written.tensors)} tensors, {format_bytes(total)}"
    except CheckpointError:  # rank files of a network without experts: all is in the .master, which is no checkpoint
        return "written"

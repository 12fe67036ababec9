"""`plan SRC DST --to F`, which is also --dry-run of other verbs: bytes read and written, peak memory, files."""

import argparse
from pathlib import Path

from checkpoint_tools.formats import FORMATS, open_source, plan_output
from checkpoint_tools.formats.settings import check_world
from checkpoint_tools.sources.base import Options, Source
from checkpoint_tools.sources.stream import plan_job, split_units
from checkpoint_tools.verbs.arguments import add_format_argument, add_output_arguments, add_settings_argument
from checkpoint_tools.verbs.text import format_bytes, table


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add = parser.add_argument
    add("source", type=Path)
    add("destination", type=Path)
    add_format_argument(parser)
    add("--to", default="native", choices=sorted(n for n in FORMATS if FORMATS[n].write), help="default: native")
    add("--world", type=int, default=0, help="rank files to write, for formats that have them")
    add_settings_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Prints the plan on rank 0."""
    check_world(arguments.to, arguments.world)
    with open_source(arguments.source, options, arguments.format) as source:
        options.report(describe_plan(source, arguments.destination, options, arguments.to))
    return 0


def describe_plan(source: Source, path: Path, options: Options, to: str) -> str:
    """Returns the plan as text; reads no tensor data and writes nothing."""
    job, ranks = plan_job(source, options), options.comm.size
    reads = dict(zip(job.units, job.reads))
    most = max(sum(reads[unit] for unit in part) for part in split_units(job, ranks))
    files = plan_output(source, path, options, to)
    lines = [
        f"{source.path} ({source.format}) -> {path} ({to})",
        f"tensors  {len(source.tensors)}, in {len(job.units)} units of at most {format_bytes(options.box_bytes)}",
        f"reads    {format_bytes(sum(job.reads))} from {len(source.files)} files, at most {format_bytes(most)} a rank",
        f"memory   buffers of at most {format_bytes(9 * options.box_bytes)} a rank "
        f"(--max-memory {format_bytes(options.max_memory)})",
    ]
    if files is None:
        return "\n".join([*lines, f"writes   at least {format_bytes(job.plan.num_bytes)}"])
    lines.append(f"writes   {format_bytes(sum(files.values()))} in {len(files)} files")
    return "\n".join([*lines, "", table(("file", "bytes"), ((n, format_bytes(b)) for n, b in files.items()))])

"""`verify PATH`: every byte against its digest, every element exactly once; without digests, that all can be read."""

import argparse
from pathlib import Path

import numpy as np

from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options, Source
from checkpoint_tools.sources.stream import plan_job, read_unit, split_units
from checkpoint_tools.verbs.arguments import add_format_argument
from checkpoint_tools.verbs.text import format_bytes, progress_of
from swin_moe.checkpoint.communicator import collect
from swin_moe.checkpoint.errors import CorruptionError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("path", type=Path, help="a checkpoint, or a run for its newest one")
    add_format_argument(parser)


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Prints one sentence.

    Raises:
        CorruptionError: Naming the first thing that is wrong, and how many more.
    """
    with open_source(arguments.path, options, arguments.format) as source:
        ranks = collect(options.comm, lambda: find_problems(source, options))
        problems = list(dict.fromkeys(problem for rank in ranks for problem in rank))
        if problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise CorruptionError(problems[0] + more)
        total = sum(tensor.num_bytes for tensor in source.tensors.values())
        checked = "match their digests" if source.has_digests else "could be read (the format has no digests)"
        options.report(
            f"{source.path}: {len(source.tensors)} tensors, {format_bytes(total)}: all {checked}, "
            "no element is missing or stored twice"
        )
    return 0


def find_problems(source: Source, options: Options) -> list[str]:
    """Returns a sentence for each thing that is wrong in this rank's share of the bytes."""
    problems = source.find_problems() if options.comm.rank == 0 else []
    total = sum(tensor.num_bytes for tensor in source.tensors.values())
    with progress_of(options, total // options.comm.size) as advance:
        wrong = source.find_wrong_data(options, advance)
    if wrong is not None:
        return problems + wrong
    job = plan_job(source, options)
    units = split_units(job, options.comm.size)[options.comm.rank]
    buffer = np.empty(options.box_bytes, np.uint8)
    with progress_of(options, sum(unit.num_bytes for unit in units)) as advance:
        for unit in units:
            try:
                read_unit(source, job, unit, buffer)
            except CorruptionError as error:
                problems.append(str(error))
            advance(unit.num_bytes)
    return problems

"""`python -m launcher -n 2 [--hostfile H] [--env K=V] [--mpi MPIRUN] [--dry-run] -- -m module ARGS | script.py ARGS`"""

import argparse
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from launcher import mpi, supervise
from launcher.command import Job, Mpi, build_command, find_mpi
from launcher.env import without_world
from launcher.hosts import check_names, read_hostfile, write_hostfile
from launcher.program import check_program


def main(arguments: list[str] | None = None) -> int:
    """Returns the job's exit code; 2 with one sentence on stderr where the job cannot start."""
    arguments = sys.argv[1:] if arguments is None else arguments
    own, program = _split_at_dashes(arguments)
    try:
        options = _parser().parse_args(own)
        job = Job(options.ranks, program, options.hostfile, options.mpi, _parse_environment(options.env))
        job.check()
        if not options.dry_run:  # it may be a line for another machine
            check_program(job.program, job.environment)
        found = find_mpi(job.mpirun)
        if job.hostfile:
            job = replace(job, hostfile=_translated(job.hostfile, found))
        command, additions = build_command(job, found)
    except ValueError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return 2
    if options.no_bind:
        additions[mpi.NO_BIND] = "1"
    if options.dry_run:
        print(shlex.join(["env", *(f"{k}={v}" for k, v in additions.items()), *command] if additions else command))
        return 0
    environment = without_world(os.environ) | additions
    try:
        return supervise.run(command, environment, flavor=found.flavor, grace=options.grace)
    finally:
        if job.hostfile:
            Path(job.hostfile).unlink(missing_ok=True)


def _translated(hostfile: str, found: Mpi) -> str:
    """Returns the path of a hostfile with the same hosts as this MPI reads them."""
    hosts = read_hostfile(hostfile)
    check_names(hosts)
    handle, path = tempfile.mkstemp(prefix="launcher-hosts-")
    os.close(handle)
    write_hostfile(hosts, found.flavor, Path(path))
    return path


def parse(arguments: list[str]) -> tuple[int, list[str]]:
    """Returns (ranks, program) that the arguments ask for, for a caller that checks the program's own arguments."""
    own, program = _split_at_dashes(arguments)
    return _parser().parse_args(own).ranks, program


def _split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _parse_environment(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if not pair.partition("=")[0] or "=" not in pair:
            raise ValueError(f"--env takes NAME=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


class _Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one sentence that names the option."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{' '.join(message.split())[:300]}; {self.prog} --help says more")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m launcher", usage=__doc__)
    add = parser.add_argument
    add("-n", "--ranks", type=int, default=1, help="number of ranks (default 1)")
    add("--hostfile", default="", help="file with a host per line: host, host:4 or host slots=4")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="set for every rank; may be repeated")
    add("--mpi", default="", metavar="MPIRUN", help="a system's mpirun (default: this environment's)")
    add("--grace", type=float, default=120.0, help="seconds ranks get to save after SIGTERM (default 120)")
    add("--no-bind", action="store_true", help="do not bind each rank to its share of the cores")
    add("--dry-run", action="store_true", help="print the command and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())

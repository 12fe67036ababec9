"""From what the user asked for to what is run: hosts, ranks of each, command line, environment."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import schedulers
from launcher.command import Job, Mpi, build_command, find_mpi
from launcher.flavors.base import Start
from launcher.hosts.hostfile import Host, check_names, exclude, read_hostfile
from launcher.hosts.place import place
from launcher.job.options import parse_environment
from launcher.job.program import check_program
from launcher.machine import binding


@dataclass(frozen=True)
class Prepared:
    """A job that can be run, and run again."""

    command: list[str]
    additions: dict[str, str]  # variables on top of the environment
    mpi: Mpi
    hostfile: str = ""  # a file that the command names
    hostfile_text: str = ""

    def write_hostfile(self) -> None:
        """Writes the file that the command names, if it names one."""
        if self.hostfile:
            Path(self.hostfile).write_text(self.hostfile_text)

    def remove_hostfile(self) -> None:
        """Removes it."""
        if self.hostfile:
            Path(self.hostfile).unlink(missing_ok=True)

    def lines(self) -> list[str]:
        """Returns the lines of a shell that run the job: the hostfile, where there is one, and the command."""
        lines = []
        if self.hostfile:
            words = shlex.join(["printf", "%s\\n", *self.hostfile_text.splitlines()])
            lines.append(f"{words} > {shlex.quote(self.hostfile)}")
        additions = [f"{name}={value}" for name, value in self.additions.items()]
        return [*lines, shlex.join(["env", *additions, *self.command] if additions else self.command)]


def prepare(options: argparse.Namespace, program: list[str]) -> Prepared:
    """Returns the job. Raises ValueError, one sentence, for what cannot work; nothing is written."""
    job = Job(options.ranks, program, options.hostfile, options.mpi, parse_environment(options.env))
    job.check()
    if not options.dry_run:  # it may be a line for another machine
        check_program(job.program, job.environment)
    hosts = find_hosts(job, options.exclude)
    mpi = find_mpi(job.mpirun)
    placed = place(job.ranks, hosts) if hosts else []
    if job.hostfile and not options.dry_run:
        check_names(placed)
    return arrange(job, mpi, placed, options)


def find_hosts(job: Job, left_out: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[Host]:
    """Returns the hosts of the hostfile, else of the scheduler's allocation, less the excluded; [] = this host alone.

    Raises:
        ValueError: They cannot be read, or nothing remains.
    """
    if job.hostfile:
        hosts = read_hostfile(job.hostfile)
    else:
        found = schedulers.allocation(environ)
        hosts = found[1] if found else []
    if not left_out:
        return hosts
    if not hosts:
        raise ValueError("--exclude needs hosts to leave some out of: a hostfile, or a scheduler's allocation")
    hosts, unknown = exclude(hosts, left_out)
    if unknown:
        print(f"launcher: --exclude names {', '.join(unknown)}, none of the hosts", file=sys.stderr)
    return hosts


def arrange(job: Job, mpi: Mpi, placed: Sequence[Host], options: argparse.Namespace) -> Prepared:
    """Returns the job on these hosts, with the ranks of each as its slots; () = on this host alone."""
    ranks = sum(host.slots or 0 for host in placed) if placed else job.ranks or 1
    hostfile, text = "", ""
    if placed and mpi.flavor.hostfile:
        text = mpi.flavor.hostfile(placed)
        hostfile = str(Path(tempfile.gettempdir(), f"launcher-hosts-{os.getpid()}-{os.urandom(4).hex()}"))
    variables = [binding.NO_BIND] if options.no_bind else []
    start = Start(mpi.mpirun, ranks, os.getcwd(), tuple(placed), hostfile, tuple(variables), options.tag)
    command, additions = build_command(job, mpi, start)
    if options.no_bind:
        additions[binding.NO_BIND] = "1"
    return Prepared(command, additions, mpi, hostfile, text)

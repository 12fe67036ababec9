"""From what the user asked for to what is run: hosts, the plan, the command line, the environment."""

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
from launcher.env import without_world
from launcher.flavors.base import Start
from launcher.hosts.hostfile import Host, check_names, exclude, read_hostfile
from launcher.hosts.place import place
from launcher.job.environment import KEPT, kept, pack, travelling, unmatched, withheld
from launcher.job.options import parse_environment
from launcher.job.plan import Plan, is_here, make_plan, table, title
from launcher.job.program import check_program
from launcher.machine import network
from launcher.machine.binding import NO_BIND
from launcher.machine.software import NO_COMPARE
from launcher.machine.topology import read_machine
from launcher.meeting.rendezvous import SHOW

_LOOKED_UP = 16  # hosts whose addresses say which subnets lead to other hosts


@dataclass(frozen=True)
class Prepared:
    """A job that can be run. Another one on other hosts is made by `arrange`."""

    job: Job
    mpi: Mpi
    plan: Plan
    command: list[str]
    additions: dict[str, str]  # variables on top of the environment
    withheld: list[str]  # variables of the environment that no rank gets
    hostfile: str = ""  # a file that the command names
    hostfile_text: str = ""
    kept: tuple[str, ...] = ()  # variables that only ranks on this host get

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Returns what the command runs in."""
        passed = {name: value for name, value in environ.items() if name not in (*self.withheld, *self.kept)}
        return without_world(passed) | self.additions

    def write_hostfile(self) -> None:
        """Writes the file that the command names, if it names one; raises ValueError where it cannot."""
        if not self.hostfile:
            return
        try:
            Path(self.hostfile).write_text(self.hostfile_text)
        except OSError as error:
            raise ValueError(f"the hostfile {self.hostfile} cannot be written: {error.strerror}") from error

    def remove_hostfile(self) -> None:
        """Removes it."""
        if self.hostfile:
            Path(self.hostfile).unlink(missing_ok=True)

    def describe(self) -> list[str]:
        """Returns the lines that say what is going to run where."""
        lines = [f"launcher: {title(self.plan, f'{self.mpi.flavor} ({self.mpi.mpirun})', os.environ)}"]
        lines += table(self.plan.ranks)
        if not self.plan.is_complete:
            lines.append("launcher: what is left open, the ranks find out at start and show then")
        if self.withheld:
            what = (
                "variable that looks like a secret" if len(self.withheld) == 1 else "variables that look like secrets"
            )
            count = len(self.withheld)
            lines.append(f"launcher: withheld from the ranks: {count} {what}; --forward NAME passes one on")
        for name in self.kept:
            lines.append(f"launcher: {name} counts on this host alone; --forward {name} passes it on")
        return lines

    def shell_lines(self) -> list[str]:
        """Returns the lines of a shell that run the job: the hostfile, where there is one, and the command."""
        lines = []
        if self.hostfile:
            words = shlex.join(["printf", "%s\\n", *self.hostfile_text.splitlines()])
            lines.append(f"{words} > {shlex.quote(self.hostfile)}")
        changes = [word for name in (*self.withheld, *self.kept) for word in ("-u", name)]
        changes += [f"{name}={value}" for name, value in self.additions.items()]
        return [*lines, shlex.join(["env", *changes, *self.command] if changes else self.command)]


def prepare(options: argparse.Namespace, program: list[str]) -> Prepared:
    """Returns the job. Raises ValueError, one sentence, for what cannot work; nothing is written."""
    job = Job(options.ranks, program, options.hostfile, options.mpi, parse_environment(options.env))
    job.check()
    if not options.dry_run:  # it may be a line for another machine
        check_program(job.program, job.environment)
    missing = unmatched(os.environ, options.forward)
    if missing:
        raise ValueError(f"--forward {missing[0]!r} is no variable that is set here")
    hosts, unknown = find_hosts(job, options.exclude)
    mpi = find_mpi(job.mpirun)
    placed = place(job.ranks, hosts) if hosts else []
    if job.hostfile and not options.dry_run:
        check_names(placed)
        if mpi.flavor.ipv4_only:
            check_ipv4(placed, mpi.flavor.title)
    prepared = arrange(job, mpi, placed, options)
    if unknown:
        print(f"launcher: --exclude names {', '.join(unknown)}, none of the hosts", file=sys.stderr)
    return prepared


def ranks_of(options: argparse.Namespace) -> int:
    """Returns how many ranks there are going to be. Raises ValueError where the hosts cannot take them."""
    hosts, _ = find_hosts(Job(options.ranks, [], options.hostfile), options.exclude)
    return sum(host.slots or 0 for host in place(options.ranks, hosts)) if hosts else options.ranks or 1


def find_hosts(
    job: Job, left_out: Sequence[str], environ: Mapping[str, str] = os.environ
) -> tuple[list[Host], list[str]]:
    """Returns (hosts of the hostfile, else of the allocation, less the excluded; excluded names that are none of them).

    No hosts: this one alone.

    Raises:
        ValueError: They cannot be read, or nothing remains.
    """
    if job.hostfile:
        hosts = read_hostfile(job.hostfile)
    else:
        found = schedulers.allocation(environ)
        hosts = found[1] if found else []
    if left_out and not hosts:
        raise ValueError("--exclude needs hosts to leave some out of: a hostfile, or a scheduler's allocation")
    return exclude(hosts, left_out) if left_out else (hosts, [])


def arrange(job: Job, mpi: Mpi, placed: Sequence[Host], options: argparse.Namespace) -> Prepared:
    """Returns the job on these hosts, with the ranks of each as its slots; () = on this host alone."""
    ranks = sum(host.slots or 0 for host in placed) if placed else job.ranks or 1
    plan = make_plan(placed, ranks, read_machine(os.environ), bind=not options.no_bind)
    hostfile, text = "", ""
    if placed and (text := mpi.flavor.hostfile(placed)):
        hostfile = str(Path(tempfile.gettempdir(), f"launcher-hosts-{os.getpid()}-{os.urandom(4).hex()}"))
    settings = _settings(options, plan)
    elsewhere = any(not is_here(host.name) for host in placed)
    own = [name for name in kept(os.environ, options.forward) if elsewhere and name not in job.environment]
    settings |= {KEPT: pack(os.environ, own)} if own else {}
    names = travelling(os.environ, options.forward) if elsewhere else []
    variables = tuple(dict.fromkeys([*names, *settings]))
    tagged = options.tag and options.dry_run  # else the launcher does it
    start = Start(mpi.mpirun, ranks, os.getcwd(), tuple(placed), hostfile, variables, tagged)
    command, additions = build_command(job, mpi, start)
    additions |= settings
    if elsewhere and mpi.flavor.keep_off:
        chosen = os.environ | job.environment
        additions = mpi.flavor.keep_off(mpi.mpirun, closed_networks(placed), chosen) | additions
    if os.environ.get("SLURM_JOB_ID") and mpi.flavor.name != "srun" and "SLURM_CPU_BIND" not in os.environ:
        # mpirun starts its daemons through srun, as one task on each node, which Slurm may bind to one core.
        additions["SLURM_CPU_BIND"] = "none"
    secrets = [name for name in withheld(os.environ, options.forward) if name not in additions]
    return Prepared(job, mpi, plan, command, additions, secrets, hostfile, text, tuple(own))


def check_ipv4(hosts: Sequence[Host], title: str) -> None:
    """Raises ValueError for another host that has IPv6 addresses only."""
    for host in hosts:
        known = [] if is_here(host.name) else network.addresses_of(host.name)
        if known and all(":" in address for address in known):
            raise ValueError(
                f"{host.name} has no IPv4 address, and {title} starts ranks over nothing else; use Open MPI or srun"
            )


def closed_networks(hosts: Sequence[Host]) -> list[str]:
    """Returns the subnets in which other hosts are not to be looked for, as far as this host knows."""
    others = [host.name for host in hosts if not is_here(host.name)][:_LOOKED_UP]
    known = [address for name in others for address in network.addresses_of(name)]
    return network.closed_networks(network.read_place().interfaces, known)


def _settings(options: argparse.Namespace, plan: Plan) -> dict[str, str]:
    """Returns the launcher's own variables for the ranks."""
    wanted = {
        NO_BIND: options.no_bind,
        NO_COMPARE: options.no_compare,
        SHOW: not plan.is_complete and not options.quiet,
    }
    return {name: "1" for name, on in wanted.items() if on}

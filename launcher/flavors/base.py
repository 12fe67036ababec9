"""What the launcher asks of every MPI."""

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.hosts.hostfile import Host


@dataclass(frozen=True)
class Start:
    """What is to be started, in no MPI's words."""

    launcher: str  # mpirun, mpiexec or srun
    ranks: int
    directory: str  # of every rank
    hosts: tuple[Host, ...] = ()  # with the ranks of each as its slots; () = this host alone
    hostfile: str = ""  # a file of these hosts as the flavor's `hostfile` writes it; "" = it takes none
    variables: tuple[str, ...] = ()  # of the launcher's environment, that ranks on other hosts need, too
    tagged: bool = False  # every line of output begins with its rank, without a launcher to see to that
    pmi: str = ""  # what the ranks' MPI library speaks where the starter must be told: pmix, pmi2


@dataclass(frozen=True)
class Flavor:
    """An MPI: how to know it, and how to say things to it."""

    name: str  # one word
    title: str  # as people write it
    version: re.Pattern[str]  # found in what --version prints
    options: Callable[[Start], list[str]]  # everything between the program and the command of a rank
    hostfile: Callable[[Sequence[Host]], str]  # text of a hostfile; "" = hosts stand in the options
    libraries: tuple[str, ...]  # names of its libmpi; () = the starter comes without one
    wheel: str = ""  # distribution on the package index that brings the same library
    environment: Mapping[str, str] = field(default_factory=dict)  # for the program that starts the ranks
    environment_of_root: Mapping[str, str] = field(default_factory=dict)  # the same, if root starts them
    ipv4_only: bool = False  # it reaches other hosts by IPv4 alone
    # The variables that keep its messages off subnets (the second argument) which hosts do not share; the first is the
    # program that starts the ranks, the last its environment, in which the user may have chosen. None = it takes care.
    keep_off: Callable[[str, Sequence[str], Mapping[str, str]], dict[str, str]] | None = None
    # Sent to the program that starts the ranks, arrives at every rank and lets them live.
    stop: signal.Signals = signal.SIGUSR1
    # Has the program that starts the ranks end them all, on every host; sent to it also when the launcher is gone.
    end: signal.Signals = signal.SIGKILL

    def command(self, start: Start, rank: Sequence[str]) -> list[str]:
        """Returns the whole command line; `rank` is what every rank runs."""
        return [start.launcher, *self.options(start), *rank]

    def __str__(self) -> str:
        return self.title


def with_colons(hosts: Sequence[Host]) -> str:
    """Returns a hostfile of lines host:4. Raises ValueError for an IPv6 address, which such a line cannot hold."""
    for host in hosts:
        if ":" in host.name:
            raise ValueError(f"{host.name!r}: Hydra takes no IPv6 address for a host; name it in /etc/hosts, or by DNS")
    return "".join(f"{host.name}\n" if host.slots is None else f"{host.name}:{host.slots}\n" for host in hosts)


def with_slots(hosts: Sequence[Host]) -> str:
    """Returns a hostfile of lines host slots=4."""
    return "".join(f"{host.name}\n" if host.slots is None else f"{host.name} slots={host.slots}\n" for host in hosts)

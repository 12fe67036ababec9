"""Reads hostfiles in the dialects people have and writes them in the one of the MPI that is used.

    node1
    node1:4                  MPICH, Intel MPI
    node1 slots=4            Open MPI; also max_slots=, max-slots=, ppn= (all but slots= and ppn= are read over)
    fe80::1 slots=2          IPv6 addresses; with a count in MPICH's form as [fe80::1]:2

Comments (# to the end of a line), blank lines and Windows line ends are fine. A host named again adds its slots.
"""

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_COUNT = re.compile(r"(slots|ppn)=(\d+)")
_OTHER = re.compile(r"(max[-_]slots|binding|sockets|cpus|user|username)=\S+")


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes; None = as many as come."""

    name: str
    slots: int | None


def read_hostfile(path: str) -> list[Host]:
    """Returns the hosts of a file, in order, each once.

    Raises:
        ValueError: No file, nothing in it, or a line that is no host, with its number.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise ValueError(f"--hostfile {path!r} {'is a folder, not a file' if file.is_dir() else 'does not exist'}")
        lines = file.read_text().splitlines()
    except OSError as error:
        shown = path if len(path) < 200 else f"{path[:200]} ..."
        raise ValueError(f"--hostfile {shown!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--hostfile {path!r} cannot be read: {error}") from error
    hosts: dict[str, int | None] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            host = parse_host(text)
        except ValueError as error:
            raise ValueError(f"--hostfile {path!r}, line {number}: {error}") from error
        before = hosts.get(host.name, 0)
        hosts[host.name] = None if before is None or host.slots is None else before + host.slots
    if not hosts:
        raise ValueError(f"--hostfile {path!r} names no host")
    return [Host(name, slots) for name, slots in hosts.items()]


def parse_host(text: str) -> Host:
    """Returns what one line names. Raises ValueError where it names no host, or no ranks."""
    name, *options = text.split()
    slots = None
    bracketed = re.fullmatch(r"\[([0-9A-Fa-f:.%\w]+)\](?::(.*))?", name)
    if bracketed:
        name, count = bracketed.groups()
    elif name.count(":") == 1:
        name, _, count = name.partition(":")
    else:
        count = None  # a plain name, or an IPv6 address
    if not re.fullmatch(r"[\w.:%-]+", name) or name.startswith("-"):
        raise ValueError(f"{text!r} is no host; allowed: host, host:4, host slots=4, # comment")
    if count is not None:
        slots = _slots(count, text)
    for option in options:
        match = _COUNT.fullmatch(option)
        if match:
            slots = _slots(match[2], text)
        elif not _OTHER.fullmatch(option):
            raise ValueError(f"{option!r} of {text!r} is not known; allowed: host, host:4, host slots=4, # comment")
    return Host(name, slots)


def _slots(count: str, text: str) -> int:
    if not count.isdecimal() or not int(count):
        raise ValueError(f"the ranks of {text!r} must be a whole number from 1 on, got {count!r}")
    return int(count)


def check_names(hosts: list[Host]) -> None:
    """Raises ValueError for a host whose address nobody knows, before ssh says so in words of its own."""
    for host in hosts:
        try:
            socket.getaddrinfo(host.name, None)
        except OSError as error:
            raise ValueError(f"--hostfile names {host.name!r}, whose address cannot be found ({error})") from error


def write_hostfile(hosts: list[Host], flavor: Literal["mpich", "openmpi"], path: Path) -> None:
    """Writes the hosts as this MPI reads them."""
    if flavor == "openmpi":
        lines = [host.name if host.slots is None else f"{host.name} slots={host.slots}" for host in hosts]
    else:
        lines = [host.name if host.slots is None else f"{host.name}:{host.slots}" for host in hosts]
    path.write_text("\n".join(lines) + "\n")

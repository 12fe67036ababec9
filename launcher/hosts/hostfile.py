"""Reads hostfiles in the dialects people have.

    node1
    node1:4                  MPICH, Intel MPI
    node1 slots=4            Open MPI; also max_slots=, max-slots=, ppn= (all but slots= and ppn= are read over)
    n[01-04,7]:4             many hosts with as many ranks each, as Slurm writes names; with slots=4, too
    fe80::1 slots=2          IPv6 addresses; with a count in MPICH's form as [fe80::1]:2

Comments (# to the end of a line), blank lines and Windows line ends are fine. A host named again adds its slots; a line
without a number then counts as one, as in the files of PBS and LSF, which name a host once for each of its slots.
"""

import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.hosts.nodelist import expand

_COUNT = re.compile(r"(slots|ppn)=(\d+)")
_OTHER = re.compile(r"(max[-_]slots|binding|sockets|cpus|user|username)=\S+")
_ALLOWED = "allowed: host, host:4, host slots=4, n[01-04]:4, # comment"
_MOST_HOSTS = 100_000  # of one line; a range beyond is a slip of the keyboard


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
    found: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            found += parse_hosts(text)
        except ValueError as error:
            raise ValueError(f"--hostfile {path!r}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"--hostfile {path!r} names no host")
    return merge(found)


def merge(hosts: Iterable[Host]) -> list[Host]:
    """Returns every host once, at its first place, with the slots of all its lines."""
    slots: dict[str, int | None] = {}
    for host in hosts:
        slots[host.name] = (slots[host.name] or 1) + (host.slots or 1) if host.name in slots else host.slots
    return [Host(name, count) for name, count in slots.items()]


def parse_hosts(text: str) -> list[Host]:
    """Returns what one line names. Raises ValueError where it names no host, or no ranks."""
    name, *options = text.split()
    slots = None
    bracketed = re.fullmatch(r"\[([0-9A-Fa-f:.%\w]*:[0-9A-Fa-f:.%\w]*)\](?::(.*))?", name)
    if bracketed:
        name, count = bracketed.groups()
    elif name.count(":") == 1:
        name, _, count = name.partition(":")
    else:
        count = None  # a plain name, or an IPv6 address
    names = _names(name, text)
    if count is not None:
        slots = _slots(count, text)
    for option in options:
        match = _COUNT.fullmatch(option)
        if match:
            slots = _slots(match[2], text)
        elif not _OTHER.fullmatch(option):
            raise ValueError(f"{option!r} of {text!r} is not known; {_ALLOWED}")
    return [Host(name, slots) for name in names]


def _names(name: str, text: str) -> list[str]:
    if not re.fullmatch(r"[\w.:%-]+", name):
        try:
            lengths = [int(high) - int(low) for low, high in re.findall(r"(\d{1,18})-(\d{1,18})", name)]
            if "," in re.sub(r"\[[^]]*\]", "", name) or sum(lengths) > _MOST_HOSTS:
                raise ValueError
            names = expand(name)
        except ValueError:
            raise ValueError(f"{text!r} is no host; {_ALLOWED}") from None
    else:
        names = [name]
    if not names or name.startswith("-"):
        raise ValueError(f"{text!r} is no host; {_ALLOWED}")
    return names


def _slots(count: str, text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,8}", count, re.ASCII):
        raise ValueError(f"the ranks of {text[:300]!r} must be a whole number from 1 on, got {count[:300]!r}")
    return int(count)


def exclude(hosts: Sequence[Host], lists: Sequence[str]) -> tuple[list[Host], list[str]]:
    """Returns (the hosts that remain; the names of the lists that are none of them).

    Args:
        lists: Host lists such as "n03,n[07-09]"; a name without a domain means the host with any.

    Raises:
        ValueError: Nothing remains, or a list cannot be read.
    """
    names = [name for text in lists for name in expand(text)]
    out = {name: [host for host in hosts if _same(host.name, name)] for name in names}
    gone = {host.name for found in out.values() for host in found}
    left = [host for host in hosts if host.name not in gone]
    if not left:
        raise ValueError(f"--exclude {','.join(lists)} leaves no host of {', '.join(host.name for host in hosts[:8])}")
    return left, [name for name, found in out.items() if not found]


def _same(host: str, name: str) -> bool:
    return host == name or "." not in name and ":" not in host and host.partition(".")[0] == name


def check_names(hosts: Sequence[Host]) -> None:
    """Raises ValueError for a host whose address nobody knows, before ssh says so in words of its own."""
    for host in hosts:
        try:
            socket.getaddrinfo(host.name, None)
        except OSError as error:
            raise ValueError(f"--hostfile names {host.name!r}, whose address cannot be found ({error})") from error

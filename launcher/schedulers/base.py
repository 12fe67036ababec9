"""What the launcher asks of every scheduler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.hosts.hostfile import Host, merge


@dataclass(frozen=True)
class Scheduler:
    """A scheduler: how to find its allocation."""

    name: str  # one word
    title: str  # as people write it
    # The hosts of the allocation that the environment describes, with the ranks meant for each; [] = no allocation.
    hosts: Callable[[Mapping[str, str]], list[Host]]


def read_nodefile(variable: str, path: str) -> list[Host]:
    """Returns the hosts of a file that names a host once for each of its ranks.

    Raises:
        ValueError: The file that the variable names cannot be read, or is empty.
    """
    try:
        names = Path(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{variable}={path!r} cannot be read: {error}") from error
    if not names:
        raise ValueError(f"{variable}={path!r} names no host")
    return merge(Host(name, 1) for name in names)

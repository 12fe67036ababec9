"""How many ranks every host gets. Every MPI is told these very numbers, so ranks lie alike under all of them."""

from collections.abc import Sequence
from dataclasses import replace

from launcher.hosts.hostfile import Host


def place(ranks: int | None, hosts: Sequence[Host]) -> list[Host]:
    """Returns the hosts that get ranks, with their number as slots; ranks of a host are consecutive.

    Hosts are filled in order up to their slots. Hosts without a number share what is left evenly, earlier ones first.

    Args:
        ranks: None = every slot once, and one rank on each host without a number.

    Raises:
        ValueError: More ranks than slots.
    """
    if ranks is None:
        return [replace(host, slots=host.slots or 1) for host in hosts]
    slots = sum(host.slots or 0 for host in hosts)
    open_ended = sum(host.slots is None for host in hosts)
    if ranks > slots and not open_ended:
        raise ValueError(
            f"-n {ranks}, but {len(hosts)} host{'s take' if len(hosts) > 1 else ' takes'} {slots} ranks; "
            f"ask for at most {slots}, or give the hosts more slots"
        )
    if not slots:
        given = [share(ranks, open_ended, number) for number in range(open_ended)]
        return [replace(host, slots=count) for host, count in zip(hosts, given) if count]
    left, more, placed, number = ranks, max(0, ranks - slots), [], 0
    for host in hosts:
        if host.slots is None:
            count = share(more, open_ended, number)
            number += 1
        else:
            count = min(left, host.slots)
        left -= count
        if count:
            placed.append(replace(host, slots=count))
    return placed


def share(total: int, parts: int, number: int) -> int:
    """Returns how much of `total` part `number` gets of an even split, where earlier parts get the rest."""
    return total // parts + (number < total % parts)

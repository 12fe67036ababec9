"""How the ranks of a world agree where rank 0 is to be met, and over which interface: one gather and one broadcast."""

import os
import socket
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.job.plan import LOOPBACK, RankPlan, table
from launcher.machine import network
from launcher.machine.network import Interface, Place
from launcher.machine.software import Software, differences

SHOW = "LAUNCHER_SHOW_RANKS"  # set: rank 0 prints the table of what ranks found at start
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Facts:
    """What a rank brings to the meeting."""

    local_rank: int
    place: Place
    cores: tuple[str, str, str]  # cores, NUMA nodes and GPU as they stand in the table
    software: Software | None = None  # None = not to be compared

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, from which `from_json` makes the same again."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Facts":
        """Returns what `to_json` was of. Raises KeyError or TypeError for anything else."""
        place = dict(data["place"])
        place["interfaces"] = tuple(Interface(**interface) for interface in place["interfaces"])
        software = None if data["software"] is None else Software(**data["software"])
        return Facts(int(data["local_rank"]), Place(**place), tuple(data["cores"]), software)


class NoRoute(ValueError):
    """Hosts that cannot reach one another."""


@dataclass(frozen=True)
class Meeting:
    """What the ranks agreed on."""

    address: str = ""
    port: int = 0
    network: str = ""  # subnet that all share; "" = there is none, every rank takes its route to the address
    problem: str = ""  # why there is no meeting, for every rank to say
    no_route: bool = False  # the problem is one of hosts, not of what somebody set

    @property
    def on_one_host(self) -> bool:
        """Returns whether nothing leaves the host."""
        return self.address == "127.0.0.1"


def decide(everyone: Sequence[Facts], environ: MutableMapping[str, str]) -> Meeting:
    """Returns where the ranks meet; called on rank 0, whose host the address and the free port are of."""
    places = [facts.place for facts in everyone]
    try:
        if len({place.stack for place in places}) == 1:
            return Meeting("127.0.0.1", free_port("127.0.0.1"))
        wanted = next((environ[name] for name in reversed(INTERFACES) if environ.get(name)), "")
        others = dict.fromkeys(place.host for place in places if place.host != places[0].host)
        routed = next(filter(None, map(network.address_towards, others)), "")
        shared = network.shared_network(places, wanted, routed)
        own = network.interface_in(places[0], shared) if shared else None
        if own is not None and shared:
            return Meeting(own.address, free_port(own.address), shared)
        if not routed:
            names = ", ".join(list(others)[:4]) or "the other hosts"
            raise NoRoute(f"the ranks share no subnet, and {places[0].host} has no route to {names}")
        return Meeting(routed, free_port(routed))
    except ValueError as error:
        return Meeting(problem=str(error), no_route=isinstance(error, NoRoute))


def reaches(meeting: Meeting) -> bool:
    """Returns whether this host has an address in the network of the meeting, or a route to it."""
    return bool(meeting.problem or meeting.network or network.address_towards(meeting.address))


def without_route(meeting: Meeting, places: Sequence[Place], reached: Sequence[bool]) -> Meeting:
    """Returns the meeting as it is, or why there is none where a rank's host does not reach it."""
    lost = list(dict.fromkeys(place.host for place, found in zip(places, reached) if not found))
    if not lost:
        return meeting
    names = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
    have = "have" if len(lost) > 1 else "has"
    words = f"the ranks share no subnet, and {names} {have} no route to {places[0].host} ({meeting.address})"
    return Meeting(problem=words, no_route=True)


def interface_of(meeting: Meeting, place: Place) -> str:
    """Returns the name of the interface with which a host takes part; "" = unknown, as seen from another one."""
    if meeting.on_one_host:
        return LOOPBACK
    shared = network.interface_in(place, meeting.network) if meeting.network else None
    return shared.name if shared else ""


def settle(meeting: Meeting, place: Place, environ: MutableMapping[str, str]) -> None:
    """Tells gloo and NCCL the interface, unless the user did. Raises ValueError where the ranks found no meeting."""
    if meeting.problem:
        raise (NoRoute if meeting.no_route else ValueError)(meeting.problem)
    name = interface_of(meeting, place)
    if not name:
        source = network.address_towards(meeting.address)
        name = next((interface.name for interface in place.interfaces if interface.address == source), "")
    for variable in INTERFACES if name else ():
        environ.setdefault(variable, name)


def lines(everyone: Sequence[Facts], meeting: Meeting, *, show: bool) -> list[str]:
    """Returns what rank 0 says at start: the table, if it is to be shown, and what differs between ranks."""
    said = []
    if show and not meeting.problem:
        ranks = [
            RankPlan(rank, facts.place.host, facts.local_rank, *facts.cores, interface_of(meeting, facts.place) or "?")
            for rank, facts in enumerate(everyone)
        ]
        said += [f"launcher: the ranks meet at {meeting.address} port {meeting.port}", *table(ranks)]
    software = [facts.software for facts in everyone if facts.software is not None]
    differing = differences(software) if len(software) == len(everyone) else []
    return said + (["launcher: not all ranks are like rank 0:", *differing] if differing else [])


def free_port(address: str) -> int:
    """Returns a port nobody listens on, below Linux's ephemeral range, so no outgoing connection takes it meanwhile.

    It is tried on the address of the meeting alone; the listener is gone when this returns.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(100):
        port = 10_000 + int.from_bytes(os.urandom(4), "big") % 20_000
        with socket.socket(family) as listener:
            try:
                listener.bind((address, port))
            except OSError:
                continue
            return port
    raise ValueError(f"no free port between 10000 and 30000 at {address} for the ranks to meet at")

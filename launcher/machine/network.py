"""Network interfaces of this host, and the one that all ranks share."""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# linux/rtnetlink.h, linux/netlink.h, linux/if_addr.h
_RTM_GETADDR, _RTM_NEWADDR = 22, 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_SCOPE_UNIVERSE, _SCOPE_SITE = 0, 200
_IFF_UP, _IFF_LOOPBACK = 1, 8
# What docker and libvirt give their bridges unless told otherwise; other hosts may have them where this one has not.
_USUAL_BRIDGES = ("172.17.0.0/16", "192.168.122.0/24")


@dataclass(frozen=True)
class Interface:
    """An address of this host that others can reach, where it lies and how fast (Mbit/s; 0 = it does not say).

    A closed one is a bridge without a network card in it: it leads to containers and virtual machines of this host.
    """

    name: str
    address: str
    prefix: int
    speed: int
    closed: bool = False

    @property
    def network(self) -> str:
        """Returns the subnet, such as 10.0.0.0/24."""
        import ipaddress  # costs a few ms, and one host needs none

        return str(ipaddress.ip_interface(f"{self.address}/{self.prefix}").network)


@dataclass(frozen=True)
class Place:
    """What one rank knows of itself: its network stack (ranks of one host share it), and its interfaces."""

    host: str
    stack: str
    interfaces: tuple[Interface, ...]


def read_place() -> Place:
    """Returns this process's host and interfaces: those that are up, without the loopback and link-local addresses."""
    return Place(socket.gethostname(), _stack(), tuple(_interfaces()))


def shared_network(places: Sequence[Place], wanted: str = "", routed: str = "") -> str | None:
    """Returns the subnet in which all ranks have an address, or None where there is none.

    A subnet in which two hosts have the same address is none that they share: every host's docker0 is 172.17.0.1. Of
    several an open one is taken before one that is some host's bridge, then the fastest (by the slowest of its
    interfaces), then the one that leads to the other hosts' names, then IPv4.

    Args:
        wanted: Names of interfaces as NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME have them, for the first rank.
        routed: Address of the first rank's host from which packets to the others' names leave.

    Raises:
        ValueError: The first rank's host has no interface of a wanted name.
    """
    first = [interface for interface in places[0].interfaces if is_wanted(interface.name, wanted)]
    if not first and wanted:
        names = ", ".join(dict.fromkeys(interface.name for interface in places[0].interfaces)) or "none"
        raise ValueError(f"{places[0].host} has no interface {wanted} with an address; it has: {names}")
    found = []
    for number, interface in enumerate(first):
        network = interface.network
        of_hosts = {place.stack: interface_in(place, network) for place in places}
        members = [member for member in of_hosts.values() if member is not None]
        if len(members) == len(of_hosts) == len({member.address for member in members}):
            slowest = min(member.speed for member in members)
            closed = any(member.closed for member in members)
            found.append((closed, -slowest, interface.address != routed, ":" in interface.address, number, network))
    return min(found)[-1] if found else None


def closed_networks(interfaces: Sequence[Interface], others: Sequence[str]) -> list[str]:
    """Returns the IPv4 subnets in which an MPI must not look for other hosts: bridges here, and the usual ones there.

    Args:
        others: Addresses of the other hosts; a subnet that holds one leads there.
    """
    import ipaddress

    known = [ipaddress.ip_address(text) for text in others if ":" not in text]
    known += [ipaddress.ip_address(one.address) for one in interfaces if not one.closed and ":" not in one.address]
    closed = [one.network for one in interfaces if one.closed and ":" not in one.address]
    subnets = [(text, ipaddress.ip_network(text)) for text in dict.fromkeys([*closed, *_USUAL_BRIDGES])]
    return [text for text, subnet in subnets if not any(address in subnet for address in known)]


def interface_in(place: Place, network: str) -> Interface | None:
    """Returns the interface of a host whose address lies in a subnet, the first of several."""
    return next((interface for interface in place.interfaces if interface.network == network), None)


def is_wanted(name: str, wanted: str) -> bool:
    """Returns whether an interface is among the names as NCCL reads them: prefixes, =exact names, ^ all but these.

    Source: NCCL 2.21 user guide, NCCL_SOCKET_IFNAME.
    """
    if wanted.startswith("^"):
        return not is_wanted(name, wanted[1:])
    if wanted.startswith("="):
        return name in wanted[1:].split(",")
    return not wanted or any(name.startswith(part) for part in wanted.split(","))


def addresses_of(name: str) -> list[str]:
    """Returns the addresses that a host's name stands for, [] where nobody knows."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def address_towards(other: str) -> str:
    """Returns the address of this host from which packets to another leave, "" where there is no way.

    Connecting a datagram socket sends nothing.
    """
    try:
        for family, kind, _, _, target in socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                try:
                    probe.connect(target)
                    return probe.getsockname()[0]
                except OSError:
                    continue
    except OSError:
        pass
    return ""


def addresses_towards(others: Sequence[str]) -> Iterator[str]:
    """Yields the addresses of this host from which packets to others leave, each once; where none of them is known, its
    own ones, which may lead there."""
    found: set[str] = set()
    for address in filter(None, map(address_towards, others)):
        if address not in found:
            found.add(address)
            yield address
    if others and not found:
        yield from own_addresses()


def own_addresses() -> list[str]:
    """Returns the addresses of this host by which others may reach it, fastest first.

    For where the others' names are not known, as a scheduler may keep addresses to itself (Slurm's NodeAddr).
    """
    usable = [interface for interface in _interfaces() if not interface.closed]
    return [interface.address for interface in sorted(usable, key=lambda one: -one.speed)]


def _stack() -> str:
    """Returns what addresses are relative to: this boot of this machine and its network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def _interfaces() -> list[Interface]:
    """Returns the addresses the kernel lists (rtnetlink(7), RTM_GETADDR); [] where it is not Linux."""
    if not hasattr(socket, "AF_NETLINK"):
        return []
    found = []
    for family, prefix, scope, index, raw in _addresses():
        try:
            name = socket.if_indextoname(index)
            flags = int(_text(name, "flags"), 16)
        except (OSError, ValueError):
            continue
        if scope in (_SCOPE_UNIVERSE, _SCOPE_SITE) and flags & _IFF_UP and not flags & _IFF_LOOPBACK:
            speed = _text(name, "speed")
            mbits = int(speed) if speed.isdigit() else 0
            found.append(Interface(name, socket.inet_ntop(family, raw), prefix, mbits, _is_closed(name)))
    return found


def _addresses() -> list[tuple[int, int, int, int, bytes]]:
    """Returns (family, length of the prefix, scope, number of the interface, address) of every address."""
    found: list[tuple[int, int, int, int, bytes]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        # struct nlmsghdr (length, type, flags, sequence, port), struct ifaddrmsg (all families)
        kernel.send(struct.pack("=IHHII BBBBi", 24, _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0, 0, 0, 0, 0, 0))
        while True:
            data = kernel.recv(1 << 16)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind != _RTM_NEWADDR:
                    return found
                family, prefix, _, scope, index = struct.unpack_from("=BBBBi", data, 16)
                attributes = dict(_attributes(data[24:length]))
                # A point-to-point link's IFA_ADDRESS is the other end's.
                raw = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
                if raw is not None and family in (socket.AF_INET, socket.AF_INET6):
                    found.append((family, prefix, scope, index, raw))
                data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found.append((kind, data[4:length]))
        data = data[max(4, (length + 3) & ~3) :]
    return found


def _is_closed(name: str, root: Path = Path("/sys/class/net")) -> bool:
    """Returns whether an interface is a bridge none of whose ports is a card, or stands on one (bond, VLAN)."""
    if not (root / name / "bridge").is_dir():
        return False
    ports = [root / port.name for port in (root / name / "brif").glob("*")]
    return not any((port / "device").exists() or any(port.glob("lower_*")) for port in ports)


def _text(name: str, what: str) -> str:
    try:
        return Path(f"/sys/class/net/{name}/{what}").read_text().strip()
    except OSError:
        return ""

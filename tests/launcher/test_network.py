"""Which interface the ranks share: by hand on small clusters, and on this host's own interfaces."""

import socket
import subprocess

import pytest

from launcher.machine import network
from launcher.machine.network import Interface, Place, is_wanted, read_place, shared_network


def place(number, *interfaces):
    """Returns host h<number> with interfaces "name address/prefix speed"."""
    found = []
    for text in interfaces:
        name, address, speed = text.split()
        found.append(Interface(name, *_split(address), int(speed)))
    return Place(f"h{number}", f"stack{number}", tuple(found))


def _split(address):
    plain, _, prefix = address.partition("/")
    return plain, int(prefix)


def hosts(*patterns, count=3):
    """Returns hosts whose addresses end in their number."""
    return [place(n, *(pattern.replace("#", str(n + 1)) for pattern in patterns)) for n in range(count)]


DOCKER, SLOW, FAST, SIX = (
    "docker0 172.17.0.1/16 0",
    "eno1 10.0.0.#/24 1000",
    "ib0 10.1.0.#/16 100000",
    "eth9 fd00::#/64 0",
)


@pytest.mark.parametrize(
    "places, options, network",
    [
        (hosts(SLOW), {}, "10.0.0.0/24"),
        (hosts(DOCKER, SLOW), {}, "10.0.0.0/24"),  # every host's own bridge
        (hosts(DOCKER), {}, None),
        (hosts(SLOW, FAST), {}, "10.1.0.0/16"),
        (hosts(SLOW, FAST), {"wanted": "eno1"}, "10.0.0.0/24"),
        (hosts(SLOW, FAST), {"wanted": "^ib,docker"}, "10.0.0.0/24"),
        (hosts(SLOW, FAST)[:2] + [place(2, "eno1 10.0.0.9/24 1000")], {}, "10.0.0.0/24"),  # one host without the fast
        (hosts(SLOW)[:2] + [place(2, "eno1 10.9.0.1/24 1000")], {}, None),
        (hosts(SIX), {}, "fd00::/64"),
        (hosts(SIX, SLOW.replace("1000", "0")), {}, "10.0.0.0/24"),
        (hosts(SIX, SLOW.replace("1000", "0")), {"wanted": "eth"}, "fd00::/64"),
        (hosts("a 10.0.0.#/24 0", "b 10.2.0.#/24 0"), {"routed": "10.2.0.1"}, "10.2.0.0/24"),
        (hosts("a 10.0.0.#/24 0", "b 10.2.0.#/24 0"), {}, "10.0.0.0/24"),
        # A link that is fast on one side only is slow.
        (
            [place(0, "a 10.0.0.1/24 100", "b 10.2.0.1/24 1000"), place(1, "a 10.0.0.2/24 100", "b 10.2.0.2/24 10")],
            {},
            "10.0.0.0/24",
        ),
        ([place(0, SLOW.replace("#", "7"))] * 2 + [place(1, SLOW.replace("#", "8"))], {}, "10.0.0.0/24"),
    ],
)
def test_shared_network(places, options, network):
    assert shared_network(places, **options) == network


def test_a_wanted_interface_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="h0 has no interface ib7 with an address; it has: eno1, ib0"):
        shared_network(hosts(SLOW, FAST), "ib7")


@pytest.mark.parametrize(
    "name, wanted, answer",
    [
        ("eth0", "", True),
        ("eth0", "eth", True),
        ("eth0", "=eth", False),
        ("eth0", "=ib0,eth0", True),
        ("eth0", "ib,eth", True),
        ("docker0", "^docker,lo", False),
        ("eth0", "^docker,lo", True),
        ("eth0", "^=eth", True),
    ],
)
def test_names_as_nccl_reads_them(name, wanted, answer):
    assert is_wanted(name, wanted) is answer


def test_interfaces_are_those_ip_lists():
    """The same addresses as iproute2 prints, but for loopback and link-local ones."""
    try:
        text = subprocess.run(["ip", "-o", "addr", "show", "up", "scope", "global"], capture_output=True, text=True)
    except OSError:
        pytest.skip("needs iproute2")
    listed = {tuple(line.split()[1:4:2]) for line in text.stdout.splitlines() if " lo " not in line}
    assert {(found.name, f"{found.address}/{found.prefix}") for found in read_place().interfaces} == listed


def test_the_way_to_another_host():
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    assert network.address_towards("no-such-host.invalid") == ""
    if socket.has_ipv6:
        assert network.address_towards("::1") in ("::1", "")

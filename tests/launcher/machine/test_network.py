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


BRIDGE = Interface("br0", "10.5.0.1", 16, 10_000, closed=True)


def test_a_bridge_is_taken_only_where_nothing_else_is_shared():
    places = [Place(f"h{n}", f"s{n}", (Interface("lxdbr0", f"10.5.0.{n}", 16, 10_000, closed=True),)) for n in (1, 2)]
    assert shared_network(places) == "10.5.0.0/16"
    slow = [
        Place(p.host, p.stack, (*p.interfaces, Interface("eth0", f"10.6.0.{n}", 24, 0))) for n, p in enumerate(places)
    ]
    assert shared_network(slow) == "10.6.0.0/24"


@pytest.mark.parametrize(
    "interfaces, others, closed",
    [
        ([], [], ["172.17.0.0/16", "192.168.122.0/24"]),
        ([BRIDGE], ["10.1.0.2"], ["10.5.0.0/16", "172.17.0.0/16", "192.168.122.0/24"]),
        ([BRIDGE], ["10.5.0.2", "fd00::1"], ["172.17.0.0/16", "192.168.122.0/24"]),  # the hosts are its containers
        ([Interface("eth0", "172.17.3.4", 20, 0)], [], ["192.168.122.0/24"]),  # a real network has docker's numbers
        ([Interface("br6", "fd00::1", 64, 0, closed=True)], ["172.17.0.2"], ["192.168.122.0/24"]),
    ],
)
def test_networks_that_lead_to_no_other_host(interfaces, others, closed):
    assert network.closed_networks(interfaces, others) == closed


@pytest.mark.parametrize(
    "links, closed",
    [
        (["eth0/device"], False),  # no bridge
        (["eth0/bridge", "eth0/brif/veth1", "veth1/ifindex"], True),
        (["eth0/bridge"], True),
        (["eth0/bridge", "eth0/brif/eno1", "eno1/device"], False),
        (["eth0/bridge", "eth0/brif/veth1", "veth1/ifindex", "eth0/brif/bond0", "bond0/lower_eno1"], False),
    ],
)
def test_a_bridge_with_a_card_in_it_is_open(links, closed, tmp_path):
    for name in links:
        (tmp_path / name).mkdir(parents=True)
    assert network._is_closed("eth0", tmp_path) is closed


def test_the_way_to_another_host():
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    assert network.address_towards("no-such-host.invalid") == ""
    assert network.addresses_of("127.0.0.1") == ["127.0.0.1"] and network.addresses_of("no-such-host.invalid") == []
    if socket.has_ipv6:
        assert network.address_towards("::1") in ("::1", "")


def test_own_addresses_lead_out_fastest_first(monkeypatch):
    found = [Interface("eno1", "10.0.0.1", 24, 1_000), BRIDGE, Interface("ib0", "10.1.0.1", 24, 200_000)]
    monkeypatch.setattr(network, "_interfaces", lambda: found)
    assert network.own_addresses() == ["10.1.0.1", "10.0.0.1"]


def test_ways_to_others_are_told_once_and_else_all_addresses_are(monkeypatch):
    ways = {"n1": "10.0.0.1", "n2": "10.0.0.1", "n3": "10.1.0.1"}
    monkeypatch.setattr(network, "address_towards", lambda name: ways.get(name, ""))
    monkeypatch.setattr(network, "own_addresses", lambda: ["10.9.0.1"])
    assert list(network.addresses_towards(["n1", "n9", "n2", "n3"])) == ["10.0.0.1", "10.1.0.1"]
    assert list(network.addresses_towards(["n9"])) == ["10.9.0.1"]
    assert list(network.addresses_towards([])) == []

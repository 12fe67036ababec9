"""Where ranks meet: the decision on data, and real tasks in network namespaces that meet over TCP, on IPv4 and IPv6."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from launcher.env import without_world
from launcher.machine.software import Software
from launcher.meeting import rendezvous, tcp
from launcher.meeting.rendezvous import (
    Facts,
    Meeting,
    NoRoute,
    decide,
    free_port,
    interface_of,
    lines,
    reaches,
    settle,
    without_route,
)
from tests.launcher.machine.test_network import DOCKER, FAST, SIX, SLOW, hosts
from tests.ranks import ROOT


def facts(places, **options):
    return [Facts(0, place, ("0-3", "0", "-"), **options) for place in places]


def test_one_host_stays_on_the_loopback(monkeypatch):
    everyone = facts(hosts(SLOW, count=1) * 3)
    meeting = decide(everyone, {})
    assert (meeting.address, meeting.network, meeting.problem) == ("127.0.0.1", "", "")
    environ = {}
    settle(meeting, everyone[2].place, environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@pytest.mark.parametrize(
    "patterns, environ, address, name",
    [
        ([DOCKER, SLOW, FAST], {}, "10.1.0.1", "ib0"),
        ([DOCKER, SLOW, FAST], {"NCCL_SOCKET_IFNAME": "eno"}, "10.0.0.1", "eno1"),
        ([DOCKER, SLOW, FAST], {"GLOO_SOCKET_IFNAME": "eno1"}, "10.0.0.1", "eno1"),
        ([SIX], {}, "fd00::1", "eth9"),
    ],
)
def test_hosts_meet_on_the_network_they_share(patterns, environ, address, name, monkeypatch):
    monkeypatch.setattr(rendezvous, "free_port", lambda address: 12345)
    monkeypatch.setattr(rendezvous.network, "address_towards", lambda other: "")
    everyone = facts(hosts(*patterns))
    meeting = decide(everyone, environ)
    assert (meeting.address, meeting.port, meeting.problem) == (address, 12345, "")
    for one in everyone:
        assert interface_of(meeting, one.place) == name
    own = dict(environ)
    settle(meeting, everyone[1].place, own)
    assert own == {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name} | environ  # what the user set stays


def test_hosts_without_a_common_subnet_take_the_route_or_say_so(monkeypatch):
    monkeypatch.setattr(rendezvous, "free_port", lambda address: 12345)
    everyone = facts([*hosts("a 10.0.1.#/32 0", count=1), *hosts("b 10.0.2.#/32 0", count=2)[1:]])
    monkeypatch.setattr(rendezvous.network, "address_towards", {"h1": "10.0.1.1", "10.0.1.1": "10.0.2.2"}.get)
    meeting = decide(everyone, {})
    assert meeting == Meeting("10.0.1.1", 12345)
    environ = {}
    settle(meeting, everyone[1].place, environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "b"
    monkeypatch.setattr(rendezvous.network, "address_towards", lambda other: "")
    meeting = decide(everyone, {})
    assert meeting.problem == "the ranks share no subnet, and h0 has no route to h1"
    with pytest.raises(NoRoute, match="share no subnet"):
        settle(meeting, everyone[1].place, {})
    assert reaches(meeting) and not reaches(Meeting("10.0.1.1", 1))
    places = [place for place in hosts(SLOW)]
    assert without_route(meeting, places, [True] * 3) == meeting
    lost = without_route(Meeting("10.0.1.1", 1), places, [True, False, False])
    assert lost.problem == "the ranks share no subnet, and h1, h2 have no route to h0 (10.0.1.1)" and lost.no_route
    with pytest.raises(ValueError, match="no interface ib7") as found:
        settle(decide(everyone, {"NCCL_SOCKET_IFNAME": "ib7"}), everyone[0].place, {})
    assert not isinstance(found.value, NoRoute)


def test_a_port_is_free_on_its_address_and_nobody_listens_at_it():
    for address, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        port = free_port(address)
        with socket.socket(family) as probe:
            assert 10_000 <= port < 30_000 and probe.connect_ex((address, port)) != 0
            with socket.create_server((address, port), family=family):
                pass


def test_the_table_of_what_ranks_found(monkeypatch):
    everyone = facts(hosts(DOCKER, SLOW, count=2))
    meeting = Meeting("10.0.0.1", 12345, "10.0.0.0/24")
    assert lines(everyone, meeting, show=False) == []
    shown = lines(everyone, meeting, show=True)
    assert shown[0] == "launcher: the ranks meet at 10.0.0.1 port 12345"
    assert [line.split() for line in shown[2:]] == [
        ["0", "h0", "0", "0-3", "0", "-", "eno1"],
        ["1", "h1", "0", "0-3", "0", "-", "eno1"],
    ]


def test_facts_survive_the_way_over_tcp():
    software = Software("3.11", "-", {"torch": "2.13.0"}, 1.5)
    for one in facts(hosts(DOCKER, SIX), software=software) + facts(hosts(SLOW)):
        assert Facts.from_json(json.loads(json.dumps(one.to_json()))) == one


def step(rank, world, host="127.0.0.1", **more):
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(world),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": host,
        "SLURM_STEP_TASKS_PER_NODE": str(world),
    } | more


def gather(world, **more):
    """Returns what every task of a step got, with tasks as threads."""
    results = [None] * world

    def run(rank):
        environ = step(rank, world, **more)
        results[rank] = tcp.gather(environ, {"rank": rank}, lambda all: {"sum": [x["rank"] for x in all]}, seconds=20)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in reversed(range(world))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("world", [1, 2, 5])
def test_tasks_without_mpi_meet_over_tcp(world):
    assert gather(world) == [{"sum": list(range(world))}] * world


def test_ports_that_others_hold_are_passed_over():
    """On the first candidate a silent stranger listens, on the second one that talks."""
    ports = tcp._ports({}, 20000 + (os.getpid() * 7) % 20000)
    with socket.create_server(("127.0.0.1", ports[0])), socket.create_server(("127.0.0.1", ports[1])) as talker:
        held = []

        def talk():
            try:
                while True:
                    held.append(talker.accept()[0])
                    held[-1].sendall(b"220 mail\n")
            except OSError:
                return

        threading.Thread(target=talk, daemon=True).start()
        began = time.monotonic()
        assert gather(2) == [{"sum": [0, 1]}] * 2
        assert time.monotonic() - began < 15


def test_reserved_ports_are_taken():
    port = free_port("127.0.0.1")
    assert tcp._ports({"SLURM_STEP_RESV_PORTS": f"{port}-{port + 1},{port + 7}"}, 0) == [
        port,
        port + 1,
        port + 7,
    ]
    assert gather(2, SLURM_STEP_RESV_PORTS=str(port)) == [{"sum": [0, 1]}] * 2


def test_a_task_that_does_not_come_is_named():
    with pytest.raises(ValueError, match=r"of 3 tasks of srun, \[1, 2\] did not come to rank 0"):
        tcp.gather(step(0, 3), {}, lambda all: {}, seconds=0.3)
    with pytest.raises(ValueError, match="task 1 of srun did not find rank 0 on 127.0.0.1"):
        tcp.gather(step(1, 3), {}, lambda all: {}, seconds=0.3)


@pytest.fixture
def two_hosts():
    """Yields the names of two network namespaces with two links between them: veth s (slow) and f, IPv4 and IPv6."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    names = [f"launcher{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


def connect(names, link, first, second):
    """Joins the namespaces by a pair of interfaces of this name with these addresses."""
    subprocess.run(
        ["ip", "-n", names[0], "link", "add", link, "type", "veth", "peer", "name", link, "netns", names[1]], check=True
    )
    for name, address in zip(names, (first, second)):
        more = ["nodad"] if ":" in address else []
        subprocess.run(["ip", "-n", name, "addr", "add", address, "dev", link, *more], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", link, "up"], check=True)


MEET = (
    "import os\n"
    "from launcher.mpi import bootstrap\n"
    "env = bootstrap()\n"
    "interfaces = os.environ['GLOO_SOCKET_IFNAME'], os.environ['NCCL_SOCKET_IFNAME']\n"
    "print(env.rank, env.master_addr, *interfaces)\n"
)
SUM = (
    "import torch, torch.distributed as dist\n"
    "dist.init_process_group('gloo')\n"
    "total = torch.ones(1)\n"
    "dist.all_reduce(total)\n"
    "assert int(total) == 2\n"
)


@pytest.mark.parametrize("program", [MEET, pytest.param(MEET + SUM, marks=pytest.mark.full)], ids=["meet", "gloo"])
@pytest.mark.parametrize("first, second", [("10.9.0.1", "10.9.0.2"), ("fd09::1", "fd09::2")])
def test_two_hosts_meet_on_the_one_network_they_share(first, second, program, two_hosts):
    """A bridge with the same address on both sides is passed over; gloo then sums over the chosen interface."""
    length = 64 if ":" in first else 24
    connect(two_hosts, "wire", f"{first}/{length}", f"{second}/{length}")
    for name in two_hosts:
        subprocess.run(
            ["ip", "-n", name, "link", "add", "docker0", "type", "veth", "peer", "name", "inner"], check=True
        )
        subprocess.run(["ip", "-n", name, "addr", "add", "172.17.0.1/16", "dev", "docker0"], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "docker0", "up"], check=True)
    processes = []
    for rank, name in enumerate(two_hosts):
        environ = (
            without_world(os.environ)
            | step(rank, 2, f"{first},{second}")
            | {
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_NODEID": str(rank),
                "SLURM_LOCALID": "0",
                "RES_OPTIONS": "timeout:1 attempts:1",  # torch looks names up, and nobody answers here
            }
        )
        command = ["ip", "netns", "exec", name, sys.executable, "-c", program]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, **pipes))
    outputs = [process.communicate(timeout=120)[0] for process in processes]  # torch warns of names it cannot find
    assert [output.split() for output in outputs] == [[str(rank), first, "wire", "wire"] for rank in (0, 1)]
    assert [process.returncode for process in processes] == [0, 0]

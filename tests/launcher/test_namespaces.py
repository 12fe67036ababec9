"""Jobs on several hosts: real MPIs, started over ssh, in namespaces with networks, names and processes of their own."""

import json
import sys
import time

import pytest

from tests.launcher.namespaces import Cluster, why_not
from tests.launcher.test_faults import MPIS

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]
PATIENCE = 120.0  # seconds; tests wait for conditions, and a busy machine is slow
SLOW, FAST, DOCKER = "eth0 10.20.0.#/24 office 1000", "ib0 10.30.0.#/24 fabric 100000", "docker0 172.17.0.1/16"

BRIDGE = "lxdbr0 10.40.0.#/24"


def hosts(count, *cards):
    """Returns hosts n1, n2, ... whose addresses end in their number."""
    return {f"n{n}": [text.replace("#", str(n)) for text in cards] for n in range(1, count + 1)}


def launcher(cluster, hostfile, *options):
    """Returns the words of a launcher for ranks on hosts such as "n1:2 n2"."""
    lines = "".join(f"{line}\n" for line in hostfile.split())
    return [sys.executable, "-m", "launcher", "--hostfile", cluster.hostfile(lines), *options]


def program(name, folder):
    return ["--", "-m", "tests.launcher.programs", name, str(folder)]


def facts_of(folder, world):
    return [json.loads((folder / f"sum-{rank}").read_text()) for rank in range(world)]


def meet(cluster, folder, hostfile, *options, **variables):
    """Returns (what every rank knows, {host: where its ranks listen}) of a job that then ended well."""
    world = sum(int(word.partition(":")[2] or 1) for word in hostfile.split())
    process = cluster.start("n1", *launcher(cluster, hostfile, *options), *program("sum_and_wait", folder), **variables)
    while len(list(folder.glob("sum-*"))) < world:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    names = [word.partition(":")[0] for word in hostfile.split()]
    listeners = {name: cluster.listeners(name, f"{sys.executable} -m launcher.rank") for name in names}
    (folder / "go").touch()
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    return facts_of(folder, world), listeners


@pytest.mark.parametrize("mpi", MPIS)
def test_of_several_networks_the_fast_one_that_all_share_is_taken(mpi, tmp_path):
    """Not docker's bridge, which comes first and is the same everywhere; nor does any rank listen there."""
    with Cluster(hosts(3, DOCKER, SLOW, FAST), [tmp_path]) as cluster:
        ranks, listeners = meet(cluster, tmp_path, "n1 n2 n3", *mpi)
    for number, rank in enumerate(ranks, 1):
        assert (rank["host"], rank["sum"], rank["MASTER_ADDR"]) == (f"n{number}", 3, "10.30.0.1")
        assert (rank["GLOO_SOCKET_IFNAME"], rank["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib0")
        found = listeners[f"n{number}"]
        # The MPI, which comes before the choice, takes any network that leads to another host.
        usual = {f"10.20.0.{number}", f"10.30.0.{number}", "127.0.0.1"}
        if mpi:  # Open MPI listens everywhere, at one port
            assert len({port for address, port in found if address in ("0.0.0.0", "::")}) == 1
            usual |= {"0.0.0.0", "::"}
        assert {address for address, _ in found} <= usual
    assert ("10.30.0.1", int(ranks[0]["MASTER_PORT"])) in listeners["n1"]


@pytest.mark.full
@pytest.mark.parametrize("cards", [[SLOW, BRIDGE], [BRIDGE, SLOW, FAST]], ids=["slow", "fast"])
def test_a_bridge_is_passed_over_though_its_addresses_differ(cards, tmp_path):
    """As libvirt's and lxd's may: nothing but the bridge itself says that it leads nowhere."""
    with Cluster(hosts(2, *cards), [tmp_path]) as cluster:
        ranks, _ = meet(cluster, tmp_path, "n1 n2")
    assert {rank["GLOO_SOCKET_IFNAME"] for rank in ranks} == {"ib0" if FAST in cards else "eth0"}

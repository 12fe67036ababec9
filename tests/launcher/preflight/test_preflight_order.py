"""The order of the checks, with a hub whose ranks are made up: hosts, networks and links as the test has them."""

import time
from dataclasses import asdict

import pytest

from launcher.machine.network import Interface, Place
from launcher.preflight import judge
from launcher.preflight.conduct import Conductor, Settings


class Cluster:
    """Answers as ranks on these hosts would; a hub to the conductor."""

    def __init__(self, hosts, networks, *, transports=("gloo", "mpi")):
        """networks: {name of the interface: (subnet's first two numbers, Mbit/s)}, the same on every host."""
        self.world, self.lost, self.stopped = len(hosts), {}, False
        self.hosts, self.networks, self.transports = hosts, networks, transports
        self.done: list[tuple[str, list[int]]] = []
        self.slow: dict[tuple[int, int], int] = {}  # links -> how many measurements they are slow in
        self.sleepy: dict[int, int] = {}  # ranks -> in how many turns their pace is slow
        self.broken: set[tuple[int, int]] = set()
        self.refused: set[str] = set()  # transports
        self.silent: dict[str, int] = {}  # order -> the rank that does not answer it
        self.route = "10.9.0.1"

    def meet(self, seconds):
        found = {}
        for rank, host in enumerate(self.hosts):
            interfaces = [Interface(n, f"{net}.{host}.1", 16, speed) for n, (net, speed) in self.networks.items()]
            place = Place(f"real{host}", f"stack{host}", tuple(interfaces))
            found[rank] = {
                "pid": 100 + rank,
                "place": asdict(place),
                "wanted": "",
                "cores": 4,
                "gpus": 0,
                "transports": list(self.transports),
            }
        return found

    def order(self, orders, seconds):
        if orders:
            self.done.append((next(iter(orders.values()))["do"], list(orders)))
        found = {}
        for rank, order in orders.items():
            if self.silent.get(order["do"]) == rank:
                self.lost[rank] = "did not answer"
            if rank not in self.lost:
                found[rank] = getattr(self, f"_{order['do']}")(rank, order)
        return found

    def _route(self, rank, order):
        return self.route

    def _read(self, rank, order):
        return dict.fromkeys(("free_memory_bytes", "disk_bytes", "tmp_bytes", "shm_bytes"), 2**40) | {"gpus": []}

    def _clock(self, rank, order):
        return 0.0, 1e-4

    def _listen(self, rank, order):
        return {"port": 1000 + rank, "spare": 5000}

    def _reach(self, rank, order):
        return [(t[0], "refused" if {(rank, t[0]), (t[0], rank)} & self.broken else "") for t in order["targets"]]

    def _measure(self, rank, order):
        pair = (rank, order["target"][0])
        speed = 1e9 if self.slow.get(pair, 0) <= 0 else 1e7
        self.slow[pair] = self.slow.get(pair, 0) - 1
        points = [(size, 1e-5 + size / speed) for size in (1 << 16, 1 << 20)]
        return {"latency_s": 1e-5, "there": points, "back": points}

    def _pace(self, rank, order):
        self.sleepy[rank] = self.sleepy.get(rank, 0) - 1
        return {"hash_bytes_per_s": 1e9 if self.sleepy[rank] < 0 else 1e8, "copy_bytes_per_s": 1e10}

    def _open(self, rank, order):
        return "RuntimeError: no" if order["transport"] in self.refused and rank == 1 else ""

    def _collective(self, rank, order):
        model = {"all_to_all": (1e-4, 1e9), "all_reduce": (5e-2, 4e8)}[order["kind"]]
        return [(model[0] + order["size"] / model[1]) * (0.5 if rank else 1.0)] * order["repeats"]

    def _close(self, rank, order):
        return None


NET = {"eth0": ("10.1", 1000), "ib0": ("10.2", 100_000)}


def run(cluster, over="auto"):
    return Conductor(cluster, Settings(over), lambda rank: f"n{cluster.hosts[rank]}").run()


def test_all_checks_are_made_and_the_models_found():
    cluster = Cluster([1, 1, 2, 2, 3, 3], NET)
    found = run(cluster)
    assert found["findings"] == [] and found["notes"] == [] and found["complete"]
    assert [host["ranks"] for host in found["hosts"]] == [[0, 1], [2, 3], [4, 5]]
    # The fast network, and each host by one of its ranks.
    assert {rank["address"] for rank in found["ranks"]} == {"10.2.1.1", "10.2.2.1", "10.2.3.1"}
    assert {(rank["interface"], rank["interface_bytes_per_s"]) for rank in found["ranks"]} == {("ib0", 12.5e9)}
    assert [ranks for do, ranks in cluster.done if do == "read"] == [[0, 2, 4]]
    assert len(found["links"]) == found["links_tried"] == 15
    fit = found["fit"]
    assert fit.keys() == {"send", "send_on_host", "all_to_all", "all_reduce"}
    assert fit["send"]["bytes_per_s"] == pytest.approx(1e9, rel=0.01) and fit["send"]["ranks"] == 2
    assert fit["all_to_all"]["latency_s"] == pytest.approx(1e-4) and fit["all_to_all"]["ranks"] == 6
    assert fit["all_reduce"]["bytes_per_s"] == pytest.approx(4e8) and fit["all_reduce"]["error"] < 1e-6
    assert {entry["backend"] for entry in found["collectives"] if entry["kind"] == "all_reduce"} == {"gloo"}


def test_ranks_of_a_host_show_their_pace_one_by_one():
    cluster = Cluster([1, 1, 2, 2], NET)
    run(cluster)
    assert [ranks for do, ranks in cluster.done if do == "pace"] == [[0, 2], [1, 3]] * 2


@pytest.mark.parametrize(
    "times, said", [(1, []), (3, []), (9, ["the link between rank 0 (n1) and rank 2 (n3) is slow"])]
)
def test_a_link_is_marked_only_if_it_stays_slow(times, said):
    cluster = Cluster([1, 2, 3, 4], NET)
    cluster.slow[0, 2] = times
    assert [finding["words"].partition(":")[0] for finding in run(cluster)["findings"]] == said


@pytest.mark.parametrize("times, said", [(1, []), (4, []), (9, ["the processor of rank 2 (n3) is slow"])])
def test_a_rank_is_marked_only_if_it_stays_slow(times, said):
    cluster = Cluster([1, 2, 3, 4], NET)
    cluster.sleepy[2] = times
    assert [finding["words"].partition(":")[0] for finding in run(cluster)["findings"]] == said


def test_no_collectives_over_broken_links():
    cluster = Cluster([1, 2, 3], NET)
    cluster.broken.add((0, 2))
    found = run(cluster)
    assert found["notes"] == ["collectives were not timed: not all ranks can reach each other"]
    assert "open" not in [do for do, _ in cluster.done] and found["unusable_hosts"] == ["n3"]
    assert [link["ranks"] for link in found["links"] if link["cause"]] == [[0, 2]]
    assert all((rank, target) != (0, 2) for rank, target in cluster.slow)  # nor was it measured


@pytest.mark.parametrize(
    "transports, refused, over, backend, notes",
    [
        (("gloo", "mpi"), set(), "mpi", "mpi", []),
        (("nccl", "gloo"), {"nccl"}, "auto", "gloo", ["collectives over nccl: rank 1: RuntimeError: no"]),
        ((), set(), "auto", None, ["collectives were not timed: no rank can use nccl or gloo or mpi"]),
        (("gloo",), set(), "nccl", None, ["collectives were not timed: no rank can use nccl"]),
        (("gloo",), set(), "none", None, ["collectives were not timed: --preflight-over none"]),
    ],
)
def test_the_transport_is_the_first_that_all_ranks_have(transports, refused, over, backend, notes):
    cluster = Cluster([1, 2], NET, transports=transports)
    cluster.refused = refused
    found = run(cluster, over)
    used = {entry["backend"] for entry in found["collectives"] if entry["kind"] == "all_reduce"}
    assert used == ({backend} if backend else set())
    assert found["notes"] == notes and judge.is_usable(found)


@pytest.mark.parametrize("order", ["read", "listen", "reach", "measure", "pace", "open", "collective"])
def test_a_rank_that_is_lost_on_the_way_is_named_and_the_rest_is_known(order):
    cluster = Cluster([1, 2, 3], NET)
    cluster.silent[order] = 1 if order != "measure" else 0
    found = run(cluster)
    lost = cluster.silent[order]
    assert [f["words"] for f in found["findings"]] == [f"rank {lost} (n{lost + 1}) did not answer"]
    assert found["unusable_hosts"] == [f"n{lost + 1}"] and found["complete"] and len(found["ranks"]) == 3


def test_hosts_without_a_network_of_all_take_their_routes():
    cluster = Cluster([1, 2], {})
    found = run(cluster, "none")
    assert {rank["address"] for rank in found["ranks"]} == {"10.9.0.1"}
    assert found["notes"][0].startswith("the hosts share no subnet") and len(found["links"]) == 1
    cluster = Cluster([1, 2], {})
    cluster.route = ""
    words = [finding["words"] for finding in run(cluster, "none")["findings"]]
    assert words == ["rank 0 (n1) has no route to the other hosts", "rank 1 (n2) has no route to real1"]


def test_one_host_talks_over_the_loopback():
    found = run(Cluster([1, 1, 1], NET), "none")
    assert {(rank["address"], rank["interface"]) for rank in found["ranks"]} == {("127.0.0.1", "lo")}
    assert found["fit"].keys() == {"send"}


def test_two_thousand_ranks_are_conducted_soon():
    began = time.process_time()
    cluster = Cluster([rank // 8 for rank in range(2048)], NET)
    found = run(cluster)
    assert found["findings"] == [] and len(found["ranks"]) == 2048
    orders = {do: sum(name == do for name, _ in cluster.done) for do, _ in cluster.done}
    assert orders["measure"] <= 66 and orders["reach"] == 1 and orders["pace"] == 16
    assert time.process_time() - began < 30.0  # 2 s on a quiet core

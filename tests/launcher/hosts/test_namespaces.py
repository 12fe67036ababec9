"""Jobs on several hosts: real MPIs, started over ssh, in namespaces with networks, names and processes of their own."""

import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from functools import partial

import pytest

from launcher.failure import kinds
from tests.launcher.failure.test_faults import MPIS, wait_for
from tests.launcher.hosts.namespaces import Cluster, why_not

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


def run(cluster, folder, name, hostfile, *options, host="n1", **variables):
    """Returns (exit code, output, seconds) of a job."""
    began = time.monotonic()
    command = [*launcher(cluster, hostfile, "--quiet", *options), *program(name, folder)]
    code, output = cluster.run(host, *command, timeout=2 * PATIENCE, **variables)
    return code, output, time.monotonic() - began


def last_line(output):
    return output.splitlines()[-1]


@pytest.mark.full
@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize(
    "cards, words",
    [
        (["eth0 10.99.0.3/24 elsewhere"], "Network is unreachable"),
        (["eth0 10.20.0.3/24 elsewhere"], "No route to host"),  # nobody answers there
    ],
)
def test_a_host_without_a_route_is_named(cards, words, mpi, tmp_path):
    with Cluster(hosts(2, DOCKER, SLOW) | {"n3": cards}, [tmp_path]) as cluster:
        code, output, _ = run(cluster, tmp_path, "write_environment", "n1 n2 n3", *mpi)
    assert code == kinds.HOST, output
    assert last_line(output) == (
        f"launcher: host (exit code 69): nothing can be started on n3: ssh: connect to host n3 port 22: {words}"
    )
    assert not list(tmp_path.glob("pid-*"))


def test_hosts_that_only_the_launcher_reaches_are_named(tmp_path):
    """n2 and n3 are on two networks, n1 on both; by the address that n1's name stands for n3 finds no way back."""
    cards = {
        "n1": ["eth0 10.21.0.1/24 left", "eth1 10.22.0.1/24 right"],
        "n2": ["eth0 10.21.0.2/24 left"],
        "n3": ["eth1 10.22.0.3/24 right"],
    }
    with Cluster(cards, [tmp_path]) as cluster:
        code, output, _ = run(cluster, tmp_path, "write_environment", "n1 n2 n3")
    assert code == kinds.HOST, output
    assert last_line(output).startswith("launcher: host (exit code 69): nothing can be started on n3: "), output
    assert last_line(output).endswith('unable to connect from "n3" to "n1" (Network is unreachable)'), output


def has_no_rank(cluster, host):
    return not any("launcher.rank" in line for line in cluster.processes(host).values())


@pytest.mark.full
@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("how", ["power", "processes", "network"])
def test_a_host_that_is_lost_in_the_middle_is_named(how, mpi, tmp_path):
    """Without power nobody hears of it, and ranks wait in a collective; without network the host itself lives on."""
    with Cluster(hosts(3, DOCKER, SLOW), [tmp_path]) as cluster:
        command = [*launcher(cluster, "n1 n2 n3", "--quiet", "--stall", "9", *mpi), *program("sum_and_wait", tmp_path)]
        process = cluster.start("n1", *command)
        wait_for(lambda: len(list(tmp_path.glob("sum-*"))) == 3, "the start of all ranks", PATIENCE)
        began = time.monotonic()
        if how == "power":
            cluster.kill("n2")
        elif how == "network":
            cluster.cut("n2", "eth0")
        else:
            for pid in cluster.processes("n2"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == kinds.HOST and time.monotonic() - began < 9 + 30, output
        last = last_line(output)
        if how == "processes":  # MPI hears of it, the host is as well as before, and nobody is to be accused
            assert last == "launcher: host (exit code 69): no rank said why", output
        else:
            lost = (
                r"(rank 1 \(n2, pid \d+\) failed first: host n2 has not answered for 9 s|nothing can be .* on n2: .*)"
            )
            assert re.fullmatch(rf"launcher: host \(exit code 69\): {lost}", last), output
        for host in {"power": ("n1", "n3")}.get(how, ("n1", "n2", "n3")):
            wait_for(partial(has_no_rank, cluster, host), f"the end of the ranks of {host}", 30)


@pytest.mark.full
@pytest.mark.parametrize("mpi", MPIS)
def test_a_job_goes_on_without_the_host_that_is_lost(mpi, tmp_path):
    """Which has no power any more; two ranks finish on what remains."""
    options = ("--stall", "9", "--restarts", "2", "--backoff", "0.1", "--allowed-ranks", "3,2", *mpi)
    with Cluster(hosts(3, DOCKER, SLOW), [tmp_path]) as cluster:
        command = [*launcher(cluster, "n1:1 n2:1 n3:1", "--quiet", *options), *program("train_slowly", tmp_path)]
        process = cluster.start("n1", *command)
        wait_for(
            lambda: "0/3/2" in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else 0, "step", PATIENCE
        )
        cluster.kill("n2")
        output = process.communicate(timeout=2 * PATIENCE)[0]
    assert process.returncode == 0, output
    words = (tmp_path / "log").read_text().split()
    assert [word.split("/")[2] for word in words] == [str(step) for step in range(10)]
    assert {word.split("/")[1] for word in words if word.startswith("1/")} == {"2"}, words
    assert "with 2 ranks, without n2" in output, output


@pytest.mark.full
def test_hosts_with_one_name_and_unequal_slots_are_told_apart(tmp_path):
    """Both call themselves the same, as images of one disk do."""
    names = {"n1": "node", "n2": "node"}
    with Cluster(hosts(2, DOCKER, SLOW), [tmp_path], names) as cluster:
        ranks, _ = meet(cluster, tmp_path, "n1:3 n2:1")
    assert [(rank["LOCAL_RANK"], rank["LOCAL_WORLD_SIZE"]) for rank in ranks] == [
        ("0", "3"),
        ("1", "3"),
        ("2", "3"),
        ("0", "1"),
    ]
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"10.20.0.1"}


@pytest.mark.full
@pytest.mark.parametrize("mpi", MPIS)
def test_hosts_with_nothing_but_ipv6(mpi, tmp_path):
    with Cluster(hosts(2, "eth0 fd20::#/64 office"), [tmp_path]) as cluster:
        if not mpi:
            code, output, _ = run(cluster, tmp_path, "write_environment", "n1 n2")
            assert code == kinds.CONFIGURATION and "n2 has no IPv4 address, and MPICH starts" in output, output
            return
        ranks, listeners = meet(cluster, tmp_path, "n1 n2", *mpi)
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"fd20::1"}
    assert ("fd20::1", int(ranks[0]["MASTER_PORT"])) in listeners["n1"]


@pytest.mark.full
def test_an_interface_that_the_user_chose_decides(tmp_path):
    with Cluster(hosts(2, SLOW, FAST), [tmp_path]) as cluster:
        ranks, _ = meet(cluster, tmp_path, "n1 n2", NCCL_SOCKET_IFNAME="=eth0")
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"10.20.0.1"}
    assert {(rank["NCCL_SOCKET_IFNAME"], rank["GLOO_SOCKET_IFNAME"]) for rank in ranks} == {("=eth0", "eth0")}


@pytest.mark.full
def test_two_jobs_at_once_do_not_meet(tmp_path):
    """On the same hosts, with different numbers of ranks."""
    folders = [tmp_path / "first", tmp_path / "second"]
    with Cluster(hosts(2, SLOW, FAST), [tmp_path]) as cluster:
        jobs = []
        for folder, hostfile in zip(folders, ("n1 n2", "n2 n1:2")):
            folder.mkdir()
            command = [*launcher(cluster, hostfile, "--quiet"), *program("sum_and_wait", folder)]
            jobs.append(cluster.start("n1", *command))
        for folder, world in zip(folders, (2, 3)):
            wait_for(lambda: len(list(folder.glob("sum-*"))) == world, "the start of all ranks", PATIENCE)  # noqa: B023
            assert [rank["sum"] for rank in facts_of(folder, world)] == [world] * world
        (folders[0] / "go").touch()
        output = jobs[0].communicate(timeout=PATIENCE)[0]
        assert jobs[0].returncode == 0 and jobs[1].poll() is None, output
        (folders[1] / "go").touch()
        output = jobs[1].communicate(timeout=PATIENCE)[0]
        assert jobs[1].returncode == 0, output


STRANGE = {
    "OMP_STRANGE": " two  spaces 'single' \"double\" $HOME `id` \\ * ; & | < > \u00e9\t!",
    "OMP_LINES": "one\ntwo\n\nfour",
    "OMP_EMPTY": "",
}


@pytest.mark.parametrize("mpi", MPIS)
def test_strange_words_reach_every_host(mpi, tmp_path):
    """Variables and arguments pass the shell that ssh starts, and the MPI's own quoting."""
    with Cluster(hosts(2, DOCKER, SLOW), [tmp_path]) as cluster:
        options = ["--env", f"COLOUR={STRANGE['OMP_STRANGE']}", *mpi]
        code, output, _ = run(cluster, tmp_path, "write_variables", "n1 n2", *options, **STRANGE)
    assert code == 0, output
    for rank in (0, 1):
        found = json.loads((tmp_path / f"variables-{rank}").read_text())
        assert {name: found.get(name) for name in STRANGE} == STRANGE, rank
        assert found["COLOUR"] == STRANGE["OMP_STRANGE"]


@pytest.mark.parametrize("mpi", MPIS)
def test_gpus_that_were_given_on_one_host_are_not_another_ones(mpi, tmp_path):
    """MPICH hands its whole environment to every host."""
    told = {"CUDA_VISIBLE_DEVICES": "2,3"}
    with Cluster(hosts(2, DOCKER, SLOW), [tmp_path]) as cluster:
        code, output, _ = run(cluster, tmp_path, "write_variables", "n1 n2", *mpi, **told)
        assert code == 0, output
        found = [json.loads((tmp_path / f"variables-{rank}").read_text()) for rank in (0, 1)]
        assert [rank.get("CUDA_VISIBLE_DEVICES") for rank in found] == ["2,3", None]
        options = ["--forward", "CUDA_VISIBLE_DEVICES", *mpi]
        code, output, _ = run(cluster, tmp_path, "write_variables", "n1 n2", *options, **told)
    assert code == 0, output
    found = [json.loads((tmp_path / f"variables-{rank}").read_text()) for rank in (0, 1)]
    assert [rank.get("CUDA_VISIBLE_DEVICES") for rank in found] == ["2,3", "2,3"]


@pytest.mark.full
@pytest.mark.parametrize("mpi", MPIS)
def test_a_host_that_hangs_at_the_start_is_named(mpi, tmp_path):
    """ssh connects, and nothing is started there."""
    with Cluster(hosts(3, DOCKER, SLOW), [tmp_path]) as cluster:
        (cluster.folder / "hang").write_text(
            '#!/bin/sh\nif [ $(hostname) = n3 ]; then exec sleep 1000; fi\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        (cluster.folder / "hang").chmod(0o755)
        key = cluster.folder / "key.pub"
        key.write_text(f'command="{cluster.folder}/hang" {key.read_text()}')
        code, output, seconds = run(cluster, tmp_path, "write_environment", "n1 n2 n3", "--stall", "8", *mpi)
    assert code == kinds.HOST, output
    assert "nothing can be started on n3: it took over 60 s" in last_line(output), output
    assert "did not start within 8 s" in output or "no rank started within 8 s" in output
    assert seconds < 8 + 60 + 60


@pytest.mark.full
def test_the_preflight_names_the_host_of_a_slow_link(tmp_path):
    with Cluster(hosts(3, DOCKER, SLOW), [tmp_path]) as cluster:
        cluster.slow_down("n3", "eth0", "10mbit")
        command = launcher(cluster, "n1 n2 n3", "--preflight", "--preflight-over", "mpi")
        code, output = cluster.run("n1", *command, timeout=2 * PATIENCE)
    slow = [line for line in output.splitlines() if "slow" in line]
    assert slow and all("n3" in line for line in slow), (code, output)

"""The preflight with real ranks: healthy, and with one thing after another wrong on purpose."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from launcher.env import without_world
from launcher.failure.kinds import HOST
from launcher.preflight import pairs
from launcher.preflight.hub import Hub, Member
from launcher.preflight.pairs import Listener, Target, cause_of, measure, reach
from tests.launcher.preflight.test_preflight_hosts import fake_nvidia_smi, gpu
from tests.ranks import ROOT

SECONDS = 120.0


def launch(*arguments, world=2, environ=None):
    """Returns (exit code, what was said) of a launcher."""
    command = [sys.executable, "-m", "launcher", "--quiet", "--no-bind", "-n", str(world), *arguments]
    environ = without_world(os.environ) | {"OMP_NUM_THREADS": "1"} | (environ or {})
    done = subprocess.run(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )
    return done.returncode, done.stdout


@pytest.mark.mpi
@pytest.mark.parametrize("world, over", [(1, "auto"), (2, "auto"), (4, "mpi")])
def test_healthy_ranks_are_measured_and_the_file_says_so(world, over, tmp_path):
    file = tmp_path / "figures.json"
    code, said = launch("--preflight", "--preflight-file", str(file), "--preflight-over", over, world=world)
    assert code == 0, said
    assert "can be used" in said.splitlines()[-1]
    found = json.loads(file.read_text())
    assert found["version"] == 1 and found["complete"] and found["unusable_hosts"] == []
    assert [rank["rank"] for rank in found["ranks"]] == list(range(world))
    assert [host["ranks"] for host in found["hosts"]] == [list(range(world))]
    assert all(host[name] > 0 for host in found["hosts"] for name in ("free_memory_bytes", "disk_bytes", "shm_bytes"))
    assert all(rank["hash_bytes_per_s"] > 1e6 and rank["address"] == "127.0.0.1" for rank in found["ranks"])
    assert len(found["links"]) == world * (world - 1) // 2
    assert all(link["cause"] == "" and link["latency_s"] > 0 and link["bytes_per_s"] > 1e6 for link in found["links"])
    kinds = {"send", "all_to_all", "all_reduce"} if world > 1 else set()
    assert found["fit"].keys() == kinds == {entry["kind"] for entry in found["collectives"]}
    backends = {entry["kind"]: entry["backend"] for entry in found["collectives"]}
    assert world == 1 or backends["all_reduce"] == ("gloo" if over == "auto" else "mpi")
    for kind, model in found["fit"].items():
        assert model["latency_s"] >= 0 and model["bytes_per_s"] > 0 and model["ranks"] in (2, world)
        sizes = [entry["bytes"] for entry in found["collectives"] if entry["kind"] == kind]
        assert sizes == sorted(set(sizes)) and len(sizes) >= 3


@pytest.mark.mpi
def test_then_the_program_starts(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os\nprint('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n")
    code, said = launch(
        "--preflight", "--preflight-over", "none", "--log-dir", str(tmp_path / "log"), "--", str(program)
    )
    assert code == 0, said
    assert re.search(r"can be used[^\n]*\n(.*\n)*rank \d of 2", said)
    assert (tmp_path / "log" / "preflight.json").is_file()


@pytest.mark.mpi
@pytest.mark.parametrize(
    "name, world, code, sentence",
    [
        ("healthy", 2, 0, "2 ranks on 1 host can be used"),
        (
            "deaf",
            2,
            HOST,
            r"unusable: rank 0 \(.*\) cannot connect to rank 1 \(.*\) at 127.0.0.1: refused: nothing listens",
        ),
        ("deaf", 4, HOST, r"unusable: rank 0 \(.*\) cannot connect to rank 1 \(.*\) at 127.0.0.1: refused"),
        ("throttled", 4, 0, r"marked: the (processor|memory) of rank 1 \(.*\) is slow: 0\.\d\d of the"),
        ("slow_to_read", 4, 0, r"marked: rank 1 \(.*\) is slow over every link: \d\.\d MB/s at best"),
        ("silent", 2, HOST, r"unusable: rank 1 \(.*\) did not answer within 3 s"),
        ("gone", 2, HOST, r"unusable: rank 1 \(.*\) ended, or its connection was cut"),
    ],
)
def test_a_rank_with_something_wrong_is_named(name, world, code, sentence, tmp_path):
    found, said = launch("--", "-m", "tests.launcher.preflight.preflight_programs", name, world=world)
    assert re.search(sentence, said), said
    if name != "gone":  # of that one, MPI knows first
        assert found == code, said
    blamed = re.findall(r"(?:unusable|marked):.*?(rank \d) \(\S+\)(?: is slow|:| did| ended)", said)
    assert name != "healthy" or blamed == []


@pytest.mark.mpi
def test_a_rank_that_never_starts_is_named_and_ends(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('PMI_RANK') == '1' and 'LAUNCHER_PREFLIGHT' in os.environ: time.sleep(99)\n"
    )
    began = time.monotonic()
    code, said = launch("--preflight", "--preflight-limit", "4", environ={"PYTHONPATH": str(tmp_path)})
    assert code == HOST, said
    assert re.search(r"unusable: rank 1 \(.*\) did not start", said) and "rank 0 (" not in said, said
    assert time.monotonic() - began < 80


@pytest.mark.mpi
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_folder_for_temporary_files_is_named(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], check=True)
    try:
        code, said = launch("--preflight", "--preflight-over", "none", "--env", f"TMPDIR={small}", world=1)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert code == HOST and "has 0.1 MiB of space for temporary files, less than 1.0 MiB" in said, said


@pytest.mark.mpi
def test_a_broken_gpu_keeps_the_program_from_starting(tmp_path):
    path = fake_nvidia_smi(tmp_path / "bin", [{}, {"index": "1", gpu._ECC: "7"}])
    program = tmp_path / "program.py"
    program.write_text("print('the program runs')\n")
    code, said = launch("--preflight", "--preflight-over", "none", "--env", f"PATH={path}", "--", str(program))
    assert code == HOST and "the program runs" not in said, said
    assert "GPU 1 (NVIDIA H100): 7 uncorrected ECC errors" in said and "2 x NVIDIA H100!" in said


def test_why_a_connection_fails():
    listener = Listener("127.0.0.1", "token", 1)
    there = Target(1, "127.0.0.1", listener.port)
    assert reach([there], "token", "127.0.0.1") == {1: ""}
    assert reach([Target(2, "127.0.0.1", listener.port)], "token", "127.0.0.1")[2].startswith("something else answers")
    assert "reset" in reach([there], "another job's", "127.0.0.1")[1]
    found = measure(there, "token", "127.0.0.1")
    assert found["latency_s"] > 0 and len(found["there"]) == len(found["back"]) >= 1
    listener.close()
    assert reach([there], "token", "127.0.0.1")[1].startswith("refused: nothing listens")
    assert measure(there, "token", "127.0.0.1")["cause"].startswith("refused")
    assert (
        reach([Target(3, "127.0.0.1", 9)], "token", "192.0.2.7")[3] == "the address of this side is not there any more"
    )
    assert cause_of(TimeoutError()).startswith("no answer within 3 s")
    assert cause_of(OSError(113, "No route to host")) == "no route to that host"


def test_a_link_that_is_slow_one_way_is_measured_so(monkeypatch):
    """The listener reads 8 MB/s: there it is slow, back it is not."""
    receive = pairs._receive

    def receive_slowly(connection, size, scratch):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(size / 8e6)
        receive(connection, size, scratch)

    monkeypatch.setattr(pairs, "_receive", receive_slowly)
    listener = Listener("127.0.0.1", "token", 1)
    found = measure(Target(1, "127.0.0.1", listener.port), "token", "127.0.0.1")
    listener.close()
    speed = {way: found[way][-1][0] / found[way][-1][1] for way in ("there", "back")}
    assert 1e6 < speed["there"] < 8.5e6 < 2e7 < speed["back"]
    assert found["there"][-1][0] < found["back"][-1][0]  # the largest size would have taken too long


class Ranks:
    """Members of a hub, in threads of this process."""

    def __init__(self, world, act, *, missing=()):
        self.hub = Hub(["127.0.0.1"], world, "token")
        self.last = {}
        self.threads = [
            threading.Thread(target=self._serve, args=(rank, act)) for rank in range(world) if rank not in missing
        ]
        for thread in self.threads:
            thread.start()

    def _serve(self, rank, act):
        member = Member(self.hub.places, "token", rank, {"rank": rank}, seconds=10)
        self.last[rank] = member.serve(lambda order: act(member, order))


def test_orders_reach_their_ranks_and_answers_come_back():
    ranks = Ranks(5, lambda member, order: member.clock() if order["do"] == "clock" else order["value"] * member.rank)
    assert ranks.hub.meet(10) == {rank: {"rank": rank} for rank in range(5)}
    assert ranks.hub.order({rank: {"do": "x", "value": 10} for rank in (1, 2, 4)}, 10) == {1: 10, 2: 20, 4: 40}
    for ahead, doubt in ranks.hub.order({rank: {"do": "clock"} for rank in range(5)}, 10).values():
        assert abs(ahead) <= doubt + 1e-3 and doubt < 5  # it is this very clock
    ranks.hub.dismiss({"do": "end", "code": 7})
    for thread in ranks.threads:
        thread.join(10)
    assert ranks.last == {rank: {"do": "end", "code": 7} for rank in range(5)} and ranks.hub.lost == {}


def test_ranks_that_do_not_come_or_do_not_answer_are_lost():
    ranks = Ranks(4, lambda member, order: time.sleep(order["seconds"]), missing=(2,))
    assert sorted(ranks.hub.meet(1.5)) == [0, 1, 3]
    assert "did not start" in ranks.hub.lost[2]
    assert ranks.hub.order({0: {"do": "x", "seconds": 0}, 1: {"do": "x", "seconds": 3}, 2: {"do": "x"}}, 1) == {0: None}
    assert ranks.hub.lost[1] == "did not answer within 1 s" and 3 not in ranks.hub.lost
    time.sleep(3)
    ranks.hub.dismiss({"do": "end"})
    for thread in ranks.threads:
        thread.join(10)


def test_strangers_are_passed_over():
    hub = Hub(["127.0.0.1"], 1, "token")
    meeting = threading.Thread(target=hub.meet, args=(3.0,))
    meeting.start()
    with pytest.raises(OSError, match="something else answers"):
        Member(hub.places, "another token", 0, {}, seconds=0.5)
    meeting.join()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"hub": 1, "rank": 0, "facts": 1}\n', b"[]\n", b"x" * 200_000):
        with socket.create_connection(hub.places[0]) as stranger:
            stranger.sendall(text)
    assert hub.meet(0.5) == {}
    hub.close()

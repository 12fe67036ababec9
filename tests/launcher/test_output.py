"""What ranks write: whole on the screen and in one file a rank, whatever ends them and whoever does not read."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.env import without_world
from launcher.failure.line import TOKEN
from launcher.output import console, lines, pump
from launcher.output.lines import Lines, frame, unframe
from tests.launcher.failure.test_faults import MPIS, wait_for
from tests.ranks import ROOT

PATIENCE = 120.0  # seconds


def shown(text, tag):
    """Returns what the screen has in the end, the slow way: a line at a time, of each what no carriage return hides."""
    whole = text.split(b"\n")
    rest = whole.pop()
    seen = [line.rstrip(b"\r").rpartition(b"\r")[2] + line[len(line.rstrip(b"\r")) :] for line in whole]
    seen += [rest.rstrip(b"\r").rpartition(b"\r")[2]] if rest.rstrip(b"\r") else []
    return b"".join((b"" if re.match(rb"\[ranks? \d", line) else tag) + line + b"\n" for line in seen)


@pytest.mark.parametrize("seed", range(200))
def test_lines_are_the_same_however_they_are_cut(seed):
    draw = random.Random(seed)
    text = b"".join(draw.choice([b"a", b"bc\xff", b"\n", b"\r", b"\r\n", b"[rank 1] x"]) for _ in range(60))
    made, at, tag = Lines(b"[3 n\\1] "), 0, b"[3 n\\1] "
    out = b""
    while at < len(text):
        size = draw.randrange(1, 9)
        out += made.feed(text[at : at + size], 0.0)
        assert out[-1:] in (b"", b"\n")
        at += size
    assert out + made.end() == shown(text, tag)


def test_the_beginning_of_a_line_is_shown_after_a_while():
    made = Lines(b"[1] ")
    assert made.feed(b"loading ...", 10.0) == b"" and made.pending
    assert made.stale(10.0 + lines.STALE_SECONDS - 1) == b""
    assert made.stale(10.0 + lines.STALE_SECONDS) == b"[1] loading ...\n" and not made.pending
    assert made.feed(b"\nnext\n", 20.0) == b"[1] next\n"  # no empty line for the newline that came late
    assert made.feed(b"10%\r20%\r", 30.0) == b"" and made.stale(40.0) == b"[1] 20%\n"
    assert made.feed(b" done\n", 41.0) == b"[1]  done\n"


def test_a_line_without_an_end_does_not_fill_the_memory():
    made = Lines()
    out = b"".join(made.feed(b"x" * 65536, 0.0) for _ in range(64)) + made.end()
    assert out.count(b"x") == 64 * 65536 and out.count(b"\n") in (3, 4)


@pytest.mark.parametrize("size", [0, 1, 899, 900, 901, 1800, 10_000])
def test_frames_carry_every_byte_in_lines_that_no_mpi_cuts(size):
    draw = random.Random(size)
    text = bytes(draw.choice(b"ab\n\r\x1e\x00\xff") for _ in range(size)) + b"y" * size
    frames = list(frame(b"12 n03", 2, text))
    assert all(len(some) <= lines.FRAMES and some.endswith(b"\n") for some in frames)
    back = [unframe(line + b"\n") for some in frames for line in some[:-1].split(b"\n")]
    assert b"".join(found[3] for found in back) == text
    assert {found[:3] for found in back} <= {(12, "n03", 2)}
    assert all(len(line) < 1024 for some in frames for line in some.split(b"\n"))  # srun cuts there
    assert unframe(b"what mpirun says\n") is None


def test_a_line_of_mpirun_that_never_ends_is_shown_piece_by_piece_and_not_kept():
    """Also where its pieces come beside frames; what begins a frame waits for its end, however it is cut."""
    taken = []

    class Screen:
        def take(self, who, rank, host, stream, data):
            taken.append((who, data))

    (framed,) = frame(b"12 n03", 1, b"whole\n")
    reader = console._Mpirun(Screen(), 2)
    for piece in (b"a" * 65536, b"b" * 65536, b"\n" + framed[:5], framed[5:9], framed[9:], b"rest", b""):
        reader.take(piece)
    said = [("mpirun", data) for data in (b"a" * 65536, b"b" * 65536, b"\n")]
    assert taken == [*said, ("12 n03", b"whole\n"), ("mpirun", b"rest")]


class Way:
    """To a launcher that takes one message of a rank in so many seconds, as one does that hardly gets any time."""

    def __init__(self, seconds):
        self._seconds, self.taken = seconds, []
        self.descriptor = os.open(os.devnull, os.O_WRONLY)

    def pack(self, stream, data):
        return [data]

    def send(self, message):
        time.sleep(self._seconds)
        self.taken.append(message)
        return b""


@pytest.mark.parametrize("slow", [0.0, 0.02])
@pytest.mark.parametrize("ends", ["finish", "close"])
def test_what_a_rank_wrote_reaches_a_slow_launcher_however_long_it_takes(ends, slow, monkeypatch):
    """Somebody is left who could write, and is waited for; what is there takes longer than that to send."""
    monkeypatch.setenv(pump.CONSOLE, "/no/socket")
    monkeypatch.setattr(pump, "_EMPTY_SECONDS", 0.05)
    monkeypatch.setattr(pump, "_READ", 1000)
    pipes = pump.Pipes()
    taking = pump.Pump(pipes, inherited=os.dup(2))
    taking._way = way = Way(slow)
    text = os.urandom(30_000)
    os.write(pipes._write[0], text)
    began = time.monotonic()
    taking.empty()
    taking.finish(0.1) if ends == "finish" else taking.close(way.descriptor)
    assert b"".join(way.taken) == text and time.monotonic() - began >= 30 * slow
    for descriptor in (*pipes.read, *pipes._write):
        os.close(descriptor)


def test_a_launcher_that_takes_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setenv(pump.CONSOLE, "/no/socket")
    monkeypatch.setattr(pump, "_EMPTY_SECONDS", 0.05)
    pipes, (read, full) = pump.Pipes(), os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, bytes(4096))
    taking = pump.Pump(pipes, inherited=full)
    os.write(pipes._write[0], b"x" * 1000)
    began = time.monotonic()
    taking.empty()
    taking.finish(0.1)
    assert 0.1 < time.monotonic() - began < PATIENCE and taking._waiting
    for descriptor in (*pipes.read, *pipes._write, read, full):
        os.close(descriptor)


def launch(program, folder, *options, world=2, **pipes):
    command = [sys.executable, "-m", "launcher", "-n", str(world), "--quiet", *options]
    command += ["--", "-m", "tests.launcher.programs", program, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    environ = without_world(os.environ)
    environ.pop("PYTHONUNBUFFERED", None)  # which would hide that lines wait in Python's buffer
    return subprocess.Popen(command, cwd=ROOT, env=environ, **pipes)


def written_by(rank, folder):
    """Returns what program write_much writes to (stdout, stderr, both in order), as it would in one process."""
    code = f"from pathlib import Path; from tests.launcher import programs as p; p._write_much(Path({str(folder)!r}), "
    command = [sys.executable, "-c", f"{code}'{rank}')"]
    apart = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    both = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return apart.stdout, apart.stderr, both.stdout


def assert_whole(screen, number, world, folder, tag="others"):
    """Compares a stream of the screen with what each rank wrote there."""
    for rank in range(world):
        head = b"" if rank == 0 and tag == "others" else b"[%d] " % rank
        mine = [line for line in screen.split(b"\n") if line.startswith(head + b"r%d " % rank)]
        expected = shown(written_by(rank, folder)[number], head).split(b"\n")
        assert mine == [line for line in expected if line], f"rank {rank}, stream {number + 1}"


@pytest.mark.mpi
@pytest.mark.parametrize("mpi", MPIS)
def test_every_line_is_whole_on_the_screen_and_every_byte_in_the_file(mpi, tmp_path):
    process = launch("write_much", tmp_path, "--log-dir", str(tmp_path / "logs"), *mpi, world=3)
    streams = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, streams
    for number, stream in enumerate(streams):
        assert_whole(stream, number, 3, tmp_path)
    for rank in range(3):
        log = (tmp_path / "logs" / "start-0" / f"rank-{rank:05d}.log").read_bytes()
        assert sorted(log) == sorted(written_by(rank, tmp_path)[2])  # two pipes have no order between them


FORWARDED = """
import os, subprocess, sys
from launcher.failure import line, orphans
from launcher.output import pump
from launcher.output.console import Console, Show
from launcher.supervise import _HANDLED
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
console = Console(Show("all", hosts=False))
environ = os.environ | {pump.CONSOLE: "/no/such/socket", line.TOKEN: os.urandom(8).hex()}
process = subprocess.Popen(sys.argv[1:], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
console.start(process)
code = process.wait()
console.close()
sys.exit(code)
"""


@pytest.mark.mpi
@pytest.mark.parametrize("mpi", MPIS)
def test_lines_of_other_hosts_come_whole_through_mpirun(mpi, tmp_path):
    """As on a host that does not see the launcher's socket."""
    options = ["--quiet", *mpi, "--dry-run", "--", "-m", "tests.launcher.programs", "write_much", str(tmp_path)]
    dry = [sys.executable, "-m", "launcher", "-n", "3", *options]
    line = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, env=without_world(os.environ)).stdout.strip()
    if mpi:  # which passes on only what it is told
        names = f"-x {pump.CONSOLE} -x {TOKEN} "
        line = line.replace(" --map-by", f" {names}--map-by")
    process = subprocess.run(
        ["bash", "-c", f'exec {sys.executable} -c "$0" {line}', FORWARDED],
        cwd=ROOT,
        env=without_world(os.environ),
        capture_output=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr
    for number, stream in enumerate((process.stdout, process.stderr)):
        assert_whole(stream, number, 3, tmp_path, tag="all")


@pytest.mark.mpi
@pytest.mark.parametrize("mpi", MPIS)
def test_what_a_killed_rank_wrote_is_not_lost(mpi, tmp_path):
    process = launch("die_in_a_line", tmp_path, "--log-dir", str(tmp_path / "logs"), *mpi)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 137
    assert b"[1] a whole line\n" in out and b"[1] the last wor\n" in out
    log = tmp_path / "logs" / "start-0" / "rank-00001.log"
    assert log.read_bytes().startswith(b"a whole line\nthe last wor")
    last, before = err.decode().splitlines()[-1], err.decode().splitlines()[-2]
    assert last.startswith("launcher: program error (exit code 137): rank 1 (")
    assert before == f"launcher: what rank 1 wrote is in {log}"


@pytest.mark.mpi
def test_a_child_that_holds_the_pipe_open_holds_up_nothing(tmp_path):
    began = time.monotonic()
    process = launch("leave_a_child_with_the_pipe", tmp_path, "--tag")
    try:
        out = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0 and time.monotonic() - began < 25
        assert b"[0] the program ends\n" in out and b"[1] the program ends\n" in out
    finally:
        for path in tmp_path.glob("child-*"):
            os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.mpi
def test_a_screen_that_stands_keeps_nobody_waiting(tmp_path):
    """12 MB wait for the screen, while the ranks go on to their end and the files are whole."""
    process = launch("write_6_megabytes", tmp_path, "--log-dir", str(tmp_path / "logs"))
    wait_for(lambda: len(list(tmp_path.glob("wrote-*"))) == 2, "the end of both ranks", PATIENCE)
    logs = [tmp_path / "logs" / "start-0" / f"rank-{rank:05d}.log" for rank in range(2)]
    texts = [b"".join(b"%d %6d %s\n" % (rank, n, b"x" * 50) for n in range(100_000)) for rank in range(2)]
    wait_for(lambda: [log.stat().st_size for log in logs] == [len(text) for text in texts], "whole files", PATIENCE)
    assert [log.read_bytes() for log in logs] == texts
    time.sleep(1)
    assert process.poll() is None  # it has lines to show
    lines = process.communicate(timeout=PATIENCE)[0].splitlines(keepends=True)
    assert process.returncode == 0
    assert b"".join(line for line in lines if line.startswith(b"0 ")) == texts[0]
    assert b"".join(line[4:] for line in lines if line.startswith(b"[1] ")) == texts[1] and len(lines) == 200_000


@pytest.mark.mpi
@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_ctrl_c_ends_a_job_whose_screen_stands(full, tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    process = launch("write_much", tmp_path, **{full: writing})
    os.close(writing)
    try:
        wait_for(lambda: len(list(tmp_path.glob("wrote-*"))) == 2, "the end of both ranks", PATIENCE)
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.poll() is not None
    finally:
        process.kill()
        os.close(reading)
        process.communicate()


@pytest.mark.mpi
def test_a_file_that_cannot_be_written_costs_a_sentence_and_nothing_else(tmp_path):
    (tmp_path / "logs" / "start-0").mkdir(parents=True)  # so that the next is start-1
    process = launch("say_two_lines", tmp_path, "--log-dir", str(tmp_path / "logs"))
    assert process.wait(PATIENCE) == 0
    process.communicate()
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"start-0", "start-1"}
    code = (
        "import os, sys\nfrom launcher.failure import line, orphans\nfrom launcher.output import pump\n"
        "os.environ.update({pump.CONSOLE: '/no', pump.LOGS: '/dev/full/x', line.TOKEN: 'a', 'PMI_RANK': '7'})\n"
        "from launcher.failure.page import Page\norphans.start_reaper(Page())\nprint('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=PATIENCE)
    found = [unframe(line + b"\n") for line in done.stderr.splitlines()]
    said = {(rank, stream): text for rank, _, stream, text in found}
    assert said[7, 1] == b"still here\n"
    assert said[7, 2].startswith(b"launcher: /dev/full/x/rank-00007.log cannot be written: Not a directory")


def test_one_rank_writes_to_the_screen_itself(tmp_path):
    """Nothing can get between its lines, and its progress bars move."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--quiet", "--", "-m", "tests.launcher.programs", "say_two_lines", "."],
        cwd=ROOT,
        env=without_world(os.environ),
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.stdout == b"first of rank 0\nsecond of rank 0\n"
    assert not (Path(ROOT) / "pid-0").unlink()

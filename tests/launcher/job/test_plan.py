"""The plan as data and as a table, and the command line it stands for, run as a shell runs what was pasted."""

import os
import re
import socket
import subprocess
import sys

import pytest

from launcher.__main__ import parse
from launcher.hosts.hostfile import Host
from launcher.job import plan
from launcher.job.plan import AT_START, make_plan, table
from launcher.machine.topology import Core, Gpu, Machine
from tests.ranks import ROOT

HERE = socket.gethostname()
TWO_NODES = Machine(
    tuple(Core(number, number // 4, (0, number)) for number in range(8)),
    None,
    (Gpu("0000:01:00.0", "NVIDIA", 1), Gpu("0000:02:00.0", "NVIDIA", 0)),
    {},
)


def cells(lines):
    return [re.split(r"\s{2,}", line) for line in lines]


def test_ranks_on_this_host_are_known_in_full():
    made = make_plan([], 2, TWO_NODES)
    assert made.is_complete
    assert cells(table(made.ranks)) == [
        ["rank", "host", "local", "cores", "numa", "gpu", "interface"],
        ["0", HERE, "0", "4-7", "1", "0 (0000:01:00.0)", "lo"],
        ["1", HERE, "1", "0-3", "0", "1 (0000:02:00.0)", "lo"],
    ]
    unbound = make_plan([], 2, TWO_NODES, bind=False)
    assert [rank.cores for rank in unbound.ranks] == ["0-7", "0-7"]


def test_other_hosts_are_found_out_at_start():
    made = make_plan([Host("far1", 2), Host(HERE, 1)], 3, TWO_NODES)
    assert not made.is_complete
    assert [(rank.rank, rank.host, rank.local_rank) for rank in made.ranks] == [
        (0, "far1", 0),
        (1, "far1", 1),
        (2, HERE, 0),
    ]
    assert cells(table(made.ranks))[1:] == [
        ["0", "far1", "0", *[AT_START] * 4],
        ["1", "far1", "1", *[AT_START] * 4],
        ["2", HERE, "0", "0-7", "0-1", "0 (0000:01:00.0)", AT_START],
    ]


def test_many_ranks_are_a_row_for_each_host():
    made = make_plan([Host("far1", 64), Host("far2", 64)], 128, TWO_NODES)
    assert cells(table(made.ranks))[1:] == [
        ["0-63", "far1", "0-63", *[AT_START] * 4],
        ["64-127", "far2", "0-63", *[AT_START] * 4],
    ]


def test_many_hosts_share_a_row_with_neighbours_that_are_alike():
    """All of 1,000 hosts, with one of another size among them; up to 64 have a row each."""
    hosts = [Host(f"n{number:04d}", 4 if number == 500 else 8) for number in range(1000)]
    assert cells(table(make_plan(hosts, 7996, TWO_NODES).ranks))[1:] == [
        ["0-3999", "n[0000-0499]", "0-7", *[AT_START] * 4],
        ["4000-4003", "n0500", "0-3", *[AT_START] * 4],
        ["4004-7995", "n[0501-0999]", "0-7", *[AT_START] * 4],
    ]
    assert [len(table(make_plan(hosts[:count], 8 * count, TWO_NODES).ranks)) for count in (64, 65)] == [65, 2]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", HERE, f"{HERE}.cluster"])
def test_names_of_this_host(name):
    assert plan.is_here(name)
    assert not plan.is_here(f"x{name}")


def launcher(*arguments, **variables):
    command = [sys.executable, "-m", "launcher", *arguments]
    environ = os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)


PROGRAM = ["--", "-m", "tests.launcher.programs", "write_environment"]


@pytest.mark.mpi
@pytest.mark.parametrize("hosts", [False, True], ids=["alone", "hostfile"])
def test_the_printed_command_does_what_the_launcher_would(hosts, tmp_path):
    """A folder with a blank and a quote in its name, and a variable with both, survive the shell."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    (tmp_path / "hosts").write_text("localhost:2\n")
    options = ["--hostfile", str(tmp_path / "hosts")] if hosts else ["-n", "2"]
    printed = launcher(*options, "--dry-run", "--env", "COLOUR=it's $HOME", *PROGRAM, str(folder), TMPDIR=str(tmp_path))
    assert printed.returncode == 0 and not list(folder.iterdir())
    assert printed.stderr.startswith("launcher: 2 ranks on 1 host, started by MPICH (")
    assert len(printed.stdout.splitlines()) == 1 + hosts
    ran = subprocess.run(["sh", "-c", printed.stdout], cwd="/", capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    for rank in (0, 1):
        facts = (folder / f"facts-{rank}").read_text()
        assert facts.startswith(f"{rank} 2 {rank} 2 127.0.0.1 ") and " it's $HOME " in facts


@pytest.mark.mpi
def test_the_plan_is_what_ranks_then_get(tmp_path):
    finished = launcher("-n", "2", *PROGRAM, str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    rows = cells(finished.stderr.splitlines()[2:4])
    for rank, row in enumerate(rows):
        bound = (tmp_path / f"facts-{rank}").read_text().split()[-1]
        assert row[0] == str(rank) and plan.short_list([int(core) for core in bound.split(",")]) == row[3]


@pytest.mark.mpi
def test_quiet_says_nothing(tmp_path):
    finished = launcher("-n", "1", "--quiet", *PROGRAM, str(tmp_path))
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--exclude", "n1"], "--exclude needs hosts to leave some out of: a hostfile, or a scheduler's allocation"),
        (
            ["-n", "9", "--hostfile", "HOSTS"],
            "-n 9, but 2 hosts take 3 ranks; ask for at most 3, or give the hosts more",
        ),
        (
            ["--hostfile", "HOSTS", "--exclude", "localhost,127.0.0.1"],
            "--exclude localhost,127.0.0.1 leaves no host of",
        ),
        (["--hostfile", "HOSTS", "--exclude", "n["], "cannot read the node list 'n['"),
    ],
)
def test_what_cannot_be_placed_is_one_sentence(arguments, sentence, tmp_path):
    (tmp_path / "hosts").write_text("localhost:2\n127.0.0.1:1\n")
    arguments = [str(tmp_path / "hosts") if word == "HOSTS" else word for word in arguments]
    finished = launcher(*arguments, *PROGRAM, str(tmp_path))
    assert finished.returncode == 2 and finished.stderr.startswith(f"launcher: {sentence}")
    assert finished.stderr.count("\n") == 1


@pytest.mark.mpi
def test_an_excluded_host_gets_no_rank(tmp_path):
    (tmp_path / "hosts").write_text("far.invalid:4\nlocalhost:2\n")
    finished = launcher("--hostfile", str(tmp_path / "hosts"), "--exclude", "far,n[1-2]", *PROGRAM, str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert "launcher: --exclude names n1, n2, none of the hosts" in finished.stderr
    assert (tmp_path / "facts-1").read_text().startswith("1 2 1 2 ")


@pytest.mark.parametrize(
    "arguments, ranks",
    [(["-n", "3"], 3), ([], 1), (["--hostfile", "HOSTS"], 6), (["--hostfile", "HOSTS", "--exclude", "a"], 2)],
)
def test_who_asks_learns_how_many_ranks_there_will_be(arguments, ranks, tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "hosts").write_text("a:4\nb:2\n")
    arguments = [str(tmp_path / "hosts") if word == "HOSTS" else word for word in arguments]
    assert parse([*arguments, "--", "x.py", "y"]) == (ranks, ["x.py", "y"])
    with pytest.raises(ValueError):
        parse(["script", "--scheduler", "slurm"])

"""Which variables reach ranks: the lists, and real ranks on hosts whose own environment is empty."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import watch
from launcher.__main__ import main
from launcher.env import without_world
from launcher.job.environment import KEPT, kept, pack, take_back, travelling, unmatched, withheld
from tests.launcher.flavors.starters import starters
from tests.ranks import ROOT

ENVIRON = {
    "PATH": "/bin", "LD_LIBRARY_PATH": "/lib", "PYTHONPATH": "/p", "VIRTUAL_ENV": "/v", "NCCL_DEBUG": "INFO",
    "UCX_TLS": "rc", "FI_PROVIDER": "efa", "OMP_NUM_THREADS": "4", "HF_HOME": "/h", "COLOUR": "blue", "HOSTNAME": "n1",
    "CUDA_VISIBLE_DEVICES": "0", "SSH_AUTH_SOCK": "/s", "LAUNCHER_TOKEN": "7",
    "HF_TOKEN": "x", "WANDB_API_KEY": "x", "DB_PASSWORD": "x", "AWS_ACCESS_KEY_ID": "x", "MY_SECRET": "x",
    "db_password": "x", "GITHUB_TOKEN_FILE": "x", "MONKEY": "x", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
SECRETS = [
    "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "GITHUB_TOKEN_FILE", "HF_TOKEN", "MY_SECRET", "WANDB_API_KEY", "db_password",
]  # fmt: skip


def test_what_travels_and_what_is_withheld():
    names = travelling(ENVIRON, [])
    assert names == [
        "FI_PROVIDER", "HF_HOME", "LAUNCHER_TOKEN", "LD_LIBRARY_PATH", "NCCL_DEBUG", "OMP_NUM_THREADS", "PATH",
        "PYTHONPATH", "UCX_TLS", "VIRTUAL_ENV",
    ]  # fmt: skip
    assert withheld(ENVIRON, []) == SECRETS


def test_what_the_user_names_travels():
    named = ["COLOUR", "HF_*", "CUDA_VISIBLE_DEVICES"]
    assert set(travelling(ENVIRON, named)) - set(travelling(ENVIRON, [])) == {
        "COLOUR",
        "HF_TOKEN",
        "CUDA_VISIBLE_DEVICES",
    }
    assert withheld(ENVIRON, named) == [name for name in SECRETS if name != "HF_TOKEN"]
    assert unmatched(ENVIRON, [*named, "WANDB_*", "NOPE*"]) == ["NOPE*"]


def test_what_is_a_hosts_own_comes_back_there_only(monkeypatch):
    assert kept(ENVIRON, []) == ["CUDA_VISIBLE_DEVICES"] and kept(ENVIRON, ["CUDA_*"]) == []
    packed = pack(ENVIRON, kept(ENVIRON, []))
    here, given, plain = {KEPT: packed}, {KEPT: packed, "CUDA_VISIBLE_DEVICES": "7"}, {"COLOUR": "blue"}
    for environ in (here, given, plain):
        take_back(environ)
    assert here == {"CUDA_VISIBLE_DEVICES": ENVIRON["CUDA_VISIBLE_DEVICES"]}
    assert given == {"CUDA_VISIBLE_DEVICES": "7"}  # of what started the rank: Slurm's daemon knows better
    assert plain == {"COLOUR": "blue"}
    monkeypatch.setattr(watch, "this_host", lambda: "another one")
    there = {KEPT: packed}
    take_back(there)
    assert there == {}


@pytest.mark.parametrize(
    "options, told",
    [([], True), (["--forward", "CUDA_*"], False), (["--env", "CUDA_VISIBLE_DEVICES=0"], False)],
)
def test_the_plan_says_what_counts_on_this_host_alone(options, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "hosts").write_text("n1\nn2\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    for hosts in (["--hostfile", str(tmp_path / "hosts")], []):
        assert main(["--dry-run", *hosts, *options, "--", "-m", "json.tool"]) == 0
        out, err = capsys.readouterr()
        line = "launcher: CUDA_VISIBLE_DEVICES counts on this host alone; --forward CUDA_VISIBLE_DEVICES passes it on\n"
        told_now = told and bool(hosts)
        assert (line in err, "-u CUDA_VISIBLE_DEVICES" in out, KEPT in out) == (told_now,) * 3


def launch(*options, environ, folder, program="write_variables"):
    command = [sys.executable, "-m", "launcher", *options, "--", "-m", "tests.launcher.programs", program, str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)


def variables(folder, rank):
    return json.loads((folder / f"variables-{rank}").read_text())


@pytest.mark.mpi
def test_a_secret_reaches_no_rank_unless_it_is_named(tmp_path):
    environ = without_world(os.environ) | {"HF_TOKEN": "hush", "MY_API_KEY": "hush", "COLOUR": "blue"}
    finished = launch("--forward", "HF_*", environ=environ, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    found = variables(tmp_path, 0)
    assert found["HF_TOKEN"] == "hush" and found["COLOUR"] == "blue" and "MY_API_KEY" not in found
    count = len(withheld(environ, ["HF_*"]))
    assert f"launcher: withheld from the ranks: {count} variable" in finished.stderr and "hush" not in finished.stderr


def test_a_name_that_is_not_set_is_refused(tmp_path):
    finished = launch("--forward", "NO_SUCH_*", environ=without_world(os.environ), folder=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == "launcher: --forward 'NO_SUCH_*' is no variable that is set here\n"


@pytest.fixture
def agent(tmp_path):
    """Returns the path of a program that stands for ssh: it runs the command here, with next to nothing set."""
    path = tmp_path / "agent"
    path.write_text(
        "#!/bin/sh\n"
        'while [ "${1#-}" != "$1" ]; do shift; done\n'
        f'echo "$1" >> {tmp_path}/asked\nshift\n'
        f'exec env -i HOME="$HOME" PATH=/usr/bin:/bin TMPDIR="$(mktemp -d -p {tmp_path})" sh -c "$*"\n'
    )
    path.chmod(0o755)
    return path


# How each MPI is told to use the agent, and that all hosts are this one.
AGENTS = {
    "mpich": ("HYDRA_LAUNCHER_EXEC", {}),
    "intel": ("I_MPI_HYDRA_BOOTSTRAP_EXEC", {}),
    "openmpi4": ("OMPI_MCA_plm_rsh_agent", {"OMPI_MCA_oob_tcp_if_include": "lo", "OMPI_MCA_btl_tcp_if_include": "lo"}),
    "openmpi5": ("PRTE_MCA_plm_ssh_agent", {}),
}


@pytest.mark.mpi
@pytest.mark.parametrize("starter", [row for row in starters() if row.id in AGENTS])
def test_ranks_on_bare_hosts_get_what_they_need(starter, agent, tmp_path, request):
    name = request.node.callspec.id
    variable, more = AGENTS[name]
    # PRRTE keeps its files of two "hosts" in one folder.
    hosts = ["127.0.0.2 slots=3"] if name == "openmpi5" else ["127.0.0.2 slots=2", "127.0.0.3 slots=1"]
    (tmp_path / "hosts").write_text("\n".join(hosts))
    environ = without_world(os.environ) | more | {
        variable: str(agent), "NCCL_DEBUG": "WARN", "COLOUR": "light blue", "OTHER": "x", "MY_PASSWORD": "hush",
        "PYTHONPATH": "/nowhere/there",
    }  # fmt: skip
    options = [*starter.options, "--hostfile", str(tmp_path / "hosts"), "--forward", "COLOUR", "--env", "SET=a b"]
    finished = launch(*options, environ=environ, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert sorted((tmp_path / "asked").read_text().split()) == [line.split()[0] for line in hosts]
    found = [variables(tmp_path, rank) for rank in range(3)]
    for rank in found:
        assert environ["PATH"] in rank["PATH"] and rank["PYTHONPATH"] == "/nowhere/there"
        assert (rank["NCCL_DEBUG"], rank["COLOUR"], rank["SET"]) == ("WARN", "light blue", "a b")
        assert "MY_PASSWORD" not in rank and rank["WORLD_SIZE"] == "3"
    local = [("0", "3"), ("1", "3"), ("2", "3")] if len(hosts) == 1 else [("0", "2"), ("1", "2"), ("0", "1")]
    assert [(rank["LOCAL_RANK"], rank["LOCAL_WORLD_SIZE"]) for rank in found] == local
    assert "launcher: the ranks meet at 127.0.0.1" in finished.stderr  # the table that only they could make
    assert Path(tmp_path, "asked").exists() and not list(Path("/tmp").glob(f"launcher-hosts-{os.getpid()}-*"))

"""Batch scripts and manifests: their whole text, what their shell does with signals, and Slurm's really submitted."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import script
from launcher.job.options import Parser, add_options, given, parser
from launcher.schedulers import SCHEDULERS
from launcher.script import parse_time
from tests.ranks import ROOT

GOLDEN = ROOT / "tests" / "golden" / "launcher"
COMMON = ["--nodes", "2", "--ranks-per-node", "4", "--cores-per-rank", "8", "--gpus-per-node", "4", "--time", "8:00:00"]
COMMON += ["--name", "swin", "--queue", "gpu", "--account", "lab", "--python", "/opt/venv/bin/python"]
PROGRAM = ["--", "-m", "json.tool", "run.name=it's new"]
CASES = {
    "slurm": ["--env", "NCCL_DEBUG=WARN"],
    "pbs": ["--forward", "WANDB_*"],
    "lsf": ["--mpi", "mpirun"],
    "flux": [],
    "k8s": ["--image", "registry/swin:1"],
    "k8s-pytorchjob": ["--image", "registry/swin:1", "--kind", "pytorchjob"],
}

# Options of each manual that a directive here may use (sources: the docstrings of launcher/schedulers).
DOCUMENTED = {
    "slurm": "--job-name --nodes --ntasks-per-node --cpus-per-task --gpus-per-node --time --partition --account"
    " --signal --output --open-mode --requeue",
    "pbs": "-N -l -j -q -A",
    "lsf": "-J -n -R -W -o -wa -wt -Q -gpu -q -P",
    "flux": "--job-name --nodes --nslots --cores-per-slot --gpus-per-slot --time-limit --queue --setattr --output",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_directives_are_those_of_the_manual(name):
    text = (GOLDEN / f"{name}.txt").read_text()
    directives = re.findall(r"^#(?:SBATCH|PBS|BSUB| flux:) (-[\w-]+)", text, re.MULTILINE)
    assert directives and set(directives) <= set(DOCUMENTED[name].split())


def test_a_node_of_flux_gives_all_its_ranks_and_gpus(capsys):
    """Also where the GPUs are no multiple of the ranks."""
    shape = ["--nodes", "3", "--ranks-per-node", "4", "--cores-per-rank", "2", "--gpus-per-node", "6"]
    assert script.main(["--scheduler", "flux", *shape, *PROGRAM]) == 0
    text = capsys.readouterr().out
    for directive in ("--nodes=3", "--nslots=3", "--cores-per-slot=8", "--gpus-per-slot=6"):
        assert f"# flux: {directive}\n" in text
    assert "-m launcher -n 12 " in text


@pytest.mark.parametrize("name", CASES)
def test_whole_text(name, capsys, monkeypatch):
    """Written anew by LAUNCHER_WRITE_GOLDEN=1; every word of it is to be read by a person."""
    monkeypatch.setattr(os, "getcwd", lambda: "/home/user/run")
    assert script.main(["--scheduler", name.partition("-")[0], *COMMON, *CASES[name], *PROGRAM]) == 0
    text = capsys.readouterr().out
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("LAUNCHER_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("k8s")])
def test_manifests_are_yaml(name):
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((GOLDEN / f"{name}.txt").read_text())
    spec = manifest["spec"]
    replicas = spec.get("mpiReplicaSpecs") or spec["pytorchReplicaSpecs"]
    pods = {role: replica["template"]["spec"] for role, replica in replicas.items()}
    assert all(pod["containers"][0]["image"] == "registry/swin:1" for pod in pods.values())
    command = pods.get("Launcher", pods.get("Master"))["containers"][0]["command"]
    if "Master" in pods:  # torchrun leaves the ranks as long as the launcher would
        timeout = {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": "270"}
        assert all(pod["containers"][0]["env"] == [timeout] for pod in pods.values())
    assert command[-3:] == ["-m", "json.tool", "run.name=it's new"]
    assert pods["Worker"]["containers"][0]["resources"]["limits"] == {"cpu": 32, "nvidia.com/gpu": 4}


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 5400),
        ("90m", 5400),
        ("45s", 45),
        ("1:30:00", 5400),
        ("36h", 129600),
        ("2d", 172800),
        ("1-12:00:00", 129600),
        ("1-12:00", 129600),
    ],
)
def test_times(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--output", ""], "--output is followed by an empty word; give a value, or leave it out"),
        (["--python="], "--python= has no value; give one, or leave it out"),
        (["--scheduler", "sge"], "argument --scheduler: invalid choice: 'sge'"),
        (["--scheduler", "slurm", "--time", "1:30"], "--time '1:30' could be minutes or hours; write h:mm:ss"),
        (
            ["--scheduler", "slurm", "--time", "soon"],
            "--time takes minutes, h:mm:ss, d-hh:mm:ss, 36h or 2d, got 'soon'",
        ),
        (["--scheduler", "slurm", "--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--scheduler", "slurm", "--nodes", "1" * 400], "argument --nodes: must be at most 2147483647, got 111"),
        (["--scheduler", "slurm", "--time", f"{'1' * 5000}:00:00"], "--time takes at most nine digits in a row, got"),
        (["--scheduler", "slurm", "--time", "1", "--warning", "60"], "--warning must be within the time limit of 60 s"),
        (["--scheduler", "slurm", "--name", "my job"], "--name takes at most 63 of a-z, 0-9 and -"),
        (["--scheduler", "pbs", "--queue", "a b"], "--queue is one word, got 'a b'"),
        (["--scheduler", "slurm", "--account", "x\n#SBATCH -x"], "--account is one word, got 'x\\n#SBATCH -x'"),
        (["--scheduler", "k8s", "--image", " "], "argument --image: needs a value, got ' '"),
        (["--scheduler", "slurm", "--kind", "mpijob"], "--kind 'mpijob' is none of Slurm's kinds: none"),
        (["--scheduler", "k8s"], "--image names the container of --scheduler k8s, and is needed there"),
        (["--scheduler", "slurm", "-o", "/no/such/folder/x"], "--output '/no/such/folder/x' cannot be written"),
    ],
)
def test_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert script.main([*arguments, *PROGRAM]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"launcher: {sentence}") and message.count("\n") == 1


# What each option of the launcher's table can be given as, for the walk below; "" = it is a flag.
VALUES = {
    "exclude": "n03",
    "mpi": "mpirun",
    "env": "A=it's",
    "forward": "WANDB_*",
    "stall": "90",
    "restarts": "3",
    "backoff": "7.5",
    "min_ranks": "4",
    "allowed_ranks": "8,4",
    "log_dir": "logs of it",
    "preflight_file": "a b.json",
    "preflight_over": "gloo",
    "preflight_limit": "33.5",
    "lost": "900",
}
SETTLED = {"ranks": "4", "hostfile": "hosts", "grace": "60", "save_after": "60", "dry_run": ""}
NEEDED = {name: ["--restarts", "1"] for name in ("backoff", "min_ranks", "allowed_ranks")}
NEEDED |= {name: ["--preflight"] for name in ("preflight_over", "preflight_limit")}
TABLE = {action.dest: action for action in add_options(Parser())}


def words_of(name):
    action = TABLE[name]
    value = (VALUES | SETTLED).get(name, "")
    assert bool(value) != isinstance(action.const, bool), f"give --{name} a value in VALUES"
    return [action.option_strings[-1], *([value] if value else [])]


@pytest.mark.parametrize("option", TABLE)
@pytest.mark.parametrize("name", CASES)
def test_every_option_is_in_the_script_or_refused(name, option, tmp_path, capsys, monkeypatch):
    """The words that the script gives the launcher are read back by the launcher's own parser."""
    monkeypatch.chdir(tmp_path)
    words = [*words_of(option), *NEEDED.get(option, [])]
    own = CASES[name] if name.startswith("k8s") else []
    code = script.main(["--scheduler", name.partition("-")[0], *COMMON, *own, *words, *PROGRAM])
    text, said = capsys.readouterr()
    if option in SETTLED or name == "k8s-pytorchjob":
        assert code == 2 and said.count("\n") == 1
        if option not in SETTLED:
            sentence = f"--kind pytorchjob does not start the launcher, so {words[0]} cannot be passed on"
            assert said == f"launcher: {sentence}\n"
        return
    assert code == 0, said
    assert not list(tmp_path.iterdir())  # no folder of --log-dir, which belongs to the job
    found = given(list(TABLE.values()), parser().parse_args(words_of_launcher(text)))
    for wanted in (option, *(word[2:] for word in NEEDED.get(option, []) if word.startswith("--"))):
        assert found[wanted] == given(list(TABLE.values()), parser().parse_args(words))[wanted]


def words_of_launcher(text):
    """Returns what stands between `-m launcher` and the dashes of a script or a manifest."""
    line = next(line for line in text.splitlines() if "launcher" in line and " -m" in line.replace('", "', " "))
    listed = re.fullmatch(r" *command: (.*)", line)
    words = json.loads(listed[1]) if listed else shlex.split(line)
    return words[words.index("launcher") + 1 : words.index("--")]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--restarts", "-1"], "--restarts must be at least 0"),
        (["--restarts", "1", "--allowed-ranks", "4,2"], "a job of 8 ranks is none of --allowed-ranks 4,2"),
        (["--backoff", "3"], "--backoff is for a job that is started again"),
        (["--grace", "5"], "--grace follows from --warning in a script"),
        (["-n", "5"], "-n has no place in a script: its ranks are --nodes times --ranks-per-node"),
    ],
)
def test_what_the_launcher_would_refuse_is_refused_before_it_is_submitted(arguments, sentence, capsys):
    assert script.main(["--scheduler", "slurm", *COMMON, *arguments, *PROGRAM]) == 2
    assert capsys.readouterr().err.startswith(f"launcher: {sentence}")


def test_the_launcher_has_the_command(tmp_path):
    out = tmp_path / "job.slurm"
    command = [sys.executable, "-m", "launcher", "script", "--scheduler", "slurm", "-o", str(out), *PROGRAM]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0
    assert finished.stderr == f"launcher: written; start it with: sbatch {out}\n"
    assert out.read_text().startswith("#!/bin/bash\n#SBATCH ")
    missing = subprocess.run([*command[:-2], "no.such.module"], cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode == 2 and "there is no module 'no'" in missing.stderr


STUB = """#!{python}
import signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
open({folder!r} + "/ready", "w").close()
end = time.monotonic() + 10
while not got and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5)
sys.exit({code})
"""


@pytest.mark.parametrize("name", ["slurm", "pbs", "lsf", "flux"])
@pytest.mark.parametrize("code, signals", [(75, 1), (75, 3), (1, 1)])
def test_a_warning_has_the_ranks_save_and_the_job_return(name, code, signals, tmp_path, capsys):
    """The script itself, with a launcher that saves for half a second and schedulers' commands that take notes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(STUB.format(python=sys.executable, folder=str(tmp_path), code=code))
    for command in ("scontrol", "qsub", "flux"):
        (programs / command).write_text(f'#!/bin/sh\necho {command} "$@" >> {tmp_path}/again\n')
    for path in programs.iterdir():
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    path = tmp_path / "job.sh"
    arguments = ["--scheduler", name, "--python", str(programs / "python"), "-o", str(path), *PROGRAM]
    assert script.main(arguments) == 0
    environ = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PBS_JOBID": "7.pbs"}
    process = subprocess.Popen(["bash", str(path)], env=environ)
    wait_for((tmp_path / "ready").exists, "the launcher")
    for _ in range(signals):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert process.wait(30) == code
    noted = (tmp_path / "again").read_text() if (tmp_path / "again").exists() else ""
    again = {
        "slurm": "scontrol requeue 7\n",
        "pbs": f"qsub -W depend=afterany:7.pbs {path}\n",
        "lsf": "",
        "flux": f"flux --parent batch {path}\n",
    }
    assert noted == (again[name] if code == 75 else "")


def wait_for(condition, what, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


@pytest.mark.mpi
@pytest.mark.parametrize("warning", ["signal", pytest.param("limit", marks=pytest.mark.full)])
def test_a_job_of_slurm_saves_and_comes_back(warning, slurm, tmp_path):
    """On two nodes with one rank each: warned (by scancel, or by Slurm before the limit), saved, requeued, finished."""
    path = tmp_path / "job.slurm"
    time_limit = ["--time", "1:00:00"] if warning == "signal" else ["--time", "2", "--warning", "90"]
    command = [sys.executable, "-m", "launcher", "script", "--scheduler", "slurm", "--nodes", "2", "--name", "again"]
    command += [
        *time_limit,
        "-o",
        str(path),
        "--",
        "-m",
        "tests.launcher.programs",
        "save_and_come_back",
        str(tmp_path),
    ]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    text = path.read_text().replace("--output=again-%j.out", f"--output={tmp_path}/log")
    path.write_text(text)
    submitted = slurm.run("sbatch", "--parsable", str(path), cwd=ROOT)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    log = tmp_path / "log"
    try:
        wait_for(lambda: len(list(tmp_path.glob("ready-*-0"))) == 2, "the start of both ranks")
        if warning == "signal":
            assert slurm.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
        wait_for(lambda: len(list(tmp_path.glob("saved-*-0"))) == 2, "saving", 180)
        wait_for(lambda: len(list(tmp_path.glob("done-*-1"))) == 2, "the second start", 180)
        state = re.compile(r"JobState=COMPLETED .*?Restarts=1 .*?ExitCode=0:0", re.DOTALL)
        wait_for(lambda: state.search(slurm.run("scontrol", "show", "job", job).stdout), "the end")
    finally:
        said = log.read_text() if log.exists() else "no log"
        print(said)
        slurm.run("scancel", job)
    assert said.count("launcher: 2 ranks on 2 hosts, started by MPICH") == 2


@pytest.mark.mpi
@pytest.mark.full
def test_a_killed_job_of_slurm_comes_back_on_the_same_node(slurm, tmp_path):
    """Its ranks are killed with what they share still there, and the job that is requeued has the same number."""
    path = tmp_path / "job.slurm"
    command = [
        sys.executable,
        "-m",
        "launcher",
        "script",
        "--scheduler",
        "slurm",
        "--ranks-per-node",
        "2",
        "--mpi",
        "srun",
    ]
    command += ["-o", str(path), "--", "-m", "tests.launcher.programs", "wait_to_be_killed_once", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    text = path.read_text().replace("--output=train-%j.out", f"--output={tmp_path}/log\n#SBATCH --nodelist=n1")
    path.write_text(text)
    job = slurm.run("sbatch", "--parsable", str(path), cwd=ROOT).stdout.strip()
    try:
        wait_for(lambda: len(list(tmp_path.glob("ready-*-0"))) == 2, "the start of both ranks")
        time.sleep(6)  # what they share is no longer young
        pids = [int(path.read_text()) for path in tmp_path.glob("ready-*-0")]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert slurm.run("scontrol", "requeue", job).returncode == 0
        state = re.compile(r"JobState=(COMPLETED|FAILED) .*?Restarts=1 ", re.DOTALL)
        wait_for(lambda: state.search(slurm.run("scontrol", "show", "job", job).stdout), "the end", 180)
        assert state.search(slurm.run("scontrol", "show", "job", job).stdout)[1] == "COMPLETED"
    finally:
        print((tmp_path / "log").read_text() if (tmp_path / "log").exists() else "no log")
        slurm.run("scancel", job)
    assert len(list(tmp_path.glob("ready-*-1"))) == 2


def test_every_scheduler_has_its_text():
    assert {row.name for row in SCHEDULERS} == {name.partition("-")[0] for name in CASES}
    assert {path.stem for path in Path(GOLDEN).glob("*.txt")} == set(CASES)

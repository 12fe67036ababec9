"""The commands as a user runs them: bad input, signals, kill -9, finished runs, other launchers."""

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from launcher.env import without_world
from swin_moe.config.io import load_config
from swin_moe.models import build_model
from swin_moe.run.session import run_main
from tests import preloaded
from tests.training.cases import TINY

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
QUICK = [*TINY, "model.moe.group_images=2", "run.name=run"]


def environment(*, anew: bool = False) -> dict[str, str]:
    """Returns variables for a command; it, and its ranks, are forks of tests.preloaded, unless they begin anew."""
    alone = without_world(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return alone if anew else preloaded.environment(alone)


def command(
    directory: Path, *options: str, ranks: int = 0, entry: str = "train", config: str = "digits_swin_moe"
) -> list[str]:
    """Returns the command line of an entry point, under the launcher with ranks > 0."""
    start = [PYTHON, "-m", "launcher", "-n", str(ranks), "--", "-m"] if ranks else [PYTHON, "-m"]
    return [*start, f"swin_moe.{entry}", config, *QUICK, f"run.output={directory}", *options]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts commands in the background, their output in a pipe; none outlives a test that fails before its end."""
    with contextlib.ExitStack() as started:

        def begin(words: list[str], *, anew: bool = False) -> subprocess.Popen:
            pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(words, env=environment(anew=anew), cwd=ROOT, **pipes)
            started.callback(process.communicate)
            started.callback(process.kill)  # before it: the ranks of a launcher end with it
            return process

        yield begin


def run(words: list[str], timeout: float = 180, *, anew: bool = False) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=environment(anew=anew), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def checkpoints(directory: Path) -> list[str]:
    return sorted(p.name for p in (directory / "run" / "checkpoints").glob("0*"))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["optim.lrr=1"], "optim.lr"),
        (["optim.lr=fast"], "optim.lr"),
        (["data.name=folder", "data.path=/nowhere/images"], "/nowhere/images"),
        (["parallel.expert=3"], "parallel.expert"),
        (["data.global_batch=33", "data.micro_batch=8"], "data.global_batch=33"),
        (["checkpoint.load=/nowhere/run"], "/nowhere/run"),
        (["model.moe.group_images=5"], "model.moe.group_images=5"),
        (["task.name=clasify"], "classify"),
        (["engine.name=torhc"], "torch"),
        (["model.num_classes=5"], "model.num_classes=5"),
        (["engine.device=cuda"], "engine.device=cuda"),
        (["parallel.zero=9"], "parallel.zero"),
        (["engine.cuda_graphs=true"], "engine.cuda_graphs=true needs a CUDA device, this run computes on cpu"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capfd, options, sentence):
    if "engine.device=cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    error = refused("train", tmp_path, capfd, *options)
    assert sentence in error
    assert not checkpoints(tmp_path)


def refused(entry: str, directory: Path, capfd: pytest.CaptureFixture, *options: str) -> str:
    """Returns the one sentence with which an entry point, run in this process, ends; exit code 2."""
    arguments = ["digits_swin_moe", *QUICK, f"run.output={directory}", *options]
    with pytest.raises(SystemExit) as stop:
        run_main(importlib.import_module(f"swin_moe.{entry}").main, arguments)
    assert stop.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]


def perform(entry: str, directory: Path, capfd: pytest.CaptureFixture, *options: str, config="digits_swin_moe") -> str:
    """Returns what an entry point, run in this process, prints."""
    run_main(importlib.import_module(f"swin_moe.{entry}").main, [config, *QUICK, f"run.output={directory}", *options])
    return capfd.readouterr().out


def test_missing_config_is_one_sentence(capfd):
    with pytest.raises(SystemExit) as stop:
        run_main(importlib.import_module("swin_moe.train").main, ["digits_swin_mo"])
    assert stop.value.code == 2 and "digits_swin_moe" in capfd.readouterr().err


def write_images(root: Path) -> Path:
    """Makes an image folder of two classes with one truncated training image; returns the broken file."""
    for split, count in (("train", 8), ("val", 3)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    broken = root / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    return broken


FOLDER = [
    "data.name=folder",
    "model.num_classes=2",
    "data.global_batch=8",
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "model.moe.group_images=1",
]


def test_corrupt_image_is_named_or_skipped(tmp_path, capfd):
    broken = write_images(tmp_path / "images")
    options = [*FOLDER, f"data.path={tmp_path / 'images'}"]
    assert str(broken) in refused("train", tmp_path, capfd, *options)
    out = perform("train", tmp_path, capfd, *options, "data.on_broken=skip")
    assert "finished: step 2 of 2" in out and "skipping" in out and str(broken) in out


def test_predict_throughput_and_official_weights(tmp_path, capfd, monkeypatch):
    write_images(tmp_path / "images")
    options = [*FOLDER, f"data.path={tmp_path / 'images'}", "data.on_broken=skip"]
    perform("train", tmp_path, capfd, *options)
    image = tmp_path / "images" / "val" / "dog" / "0.png"
    lines = perform("predict", tmp_path, capfd, *options, str(image)).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{image}: ") and "cat" in lines[0] and "dog" in lines[0]
    assert "nowhere.png" in refused("predict", tmp_path, capfd, *options, "/tmp/nowhere.png")

    for command, rest in (("predict", [str(image)]), ("evaluate", []), ("throughput", [])):
        found = refused(command, tmp_path, capfd, *options, "engine.device=cpu", "engine.cuda_graphs=true", *rest)
        assert "engine.cuda_graphs=true needs a CUDA device" in found

    out = tmp_path / "drawn"
    perform("inspect_routing", tmp_path, capfd, *options, "--out", str(out), "--images", "4", str(image))
    assert {p.name for p in out.iterdir()} == {"0.png", "classes.png", "routing.json"}
    assert "nowhere.png" in refused("inspect_routing", tmp_path, capfd, *options, "/tmp/nowhere.png")
    soft = ["model.moe.choice=soft", "model.moe.balance_loss=none"]
    assert "none is an expert's own" in refused("inspect_routing", tmp_path, capfd, *options, *soft, str(image))
    assert "no MoE layer" in refused("inspect_routing", tmp_path, capfd, *options, "model.moe.blocks=[]", str(image))

    monkeypatch.setattr("swin_moe.throughput.WARMUP", 1)
    monkeypatch.setattr("swin_moe.throughput.TIMED", 2)
    assert "images/s (1 ranks, batch 6 a rank, fp32)" in perform("throughput", tmp_path, capfd, *options)
    monkeypatch.setattr("swin_moe.throughput.peak_flops", lambda *_: 1.0)  # what a run reaches, the device can do
    assert "fp32), 100.0% of peak" in perform("throughput", tmp_path, capfd, *options)

    dense = [*options, "model.moe.blocks=[]", "run.name=dense"]
    model = build_model(load_config("digits_swin_moe", [*QUICK, *dense]).model)
    model.init_weights(3)
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    out = perform("evaluate", tmp_path, capfd, *dense, f"checkpoint.load={tmp_path / 'official.pth'}")
    assert "samples 6" in out
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    assert "bad.pth" in refused("evaluate", tmp_path, capfd, *dense, f"checkpoint.load={tmp_path / 'bad.pth'}")


def test_bad_layout_is_one_sentence_under_mpi(tmp_path):
    done = run(command(tmp_path, "parallel.expert=4", ranks=2))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "parallel.expert" in errors[0], done.stderr


def test_non_finite_loss_stops_all_ranks_and_keeps_the_checkpoint(tmp_path, capfd):
    perform("train", tmp_path, capfd, "checkpoint.every=2")
    saved = checkpoints(tmp_path)
    options = ("optim.epochs=1", "optim.lr=1e30", "optim.warmup_epochs=0", "optim.clip_norm=0", "checkpoint.every=1000")
    done = run(command(tmp_path, *options, ranks=2))
    assert done.returncode == 2
    assert "the loss is not finite at step" in done.stderr and saved[-1] in done.stderr
    assert checkpoints(tmp_path) == saved


UNUSED = ("torch._dynamo", "timm", "torchvision", "sklearn", "deepspeed", "swin_moe.planner")


def test_finished_run_is_a_no_op(tmp_path, capfd):
    large = "model.init_std=0.3"  # experts that matter after 5 steps
    words = ["digits_swin_moe", *QUICK, f"run.output={tmp_path}", large]
    code = (
        "import sys\nfrom swin_moe.run.session import run_main\nfrom swin_moe.train import main\n"
        f"run_main(main, {words!r})\n"
        f"print('loaded for nothing:', [name for name in {UNUSED} if name in sys.modules])"
    )
    first = run([PYTHON, "-c", code])
    assert first.returncode == 0 and first.stdout.endswith("loaded for nothing: []\n"), first.stdout + first.stderr
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "already finished (step 5 of 5); nothing to do" in perform("train", tmp_path, capfd, large)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    losses = set()
    for factor in (0, 0.625):  # by need, and with fewer slots than it was trained with
        out = perform("evaluate", tmp_path, capfd, large, f"model.moe.eval_capacity_factor={factor}")
        assert "samples 360" in out
        losses.add(out.partition("loss ")[2].partition(",")[0])
    assert len(losses) == 2


def wait_for_step(process: subprocess.Popen, directory: Path, step: int) -> None:
    """Waits until the run has recorded a step."""
    deadline, path = time.monotonic() + 150, directory / "run" / "metrics.jsonl"
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the run did not get there in time")


def ranks_of(directory: Path) -> list[int]:
    """Returns the processes whose command line names the run directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(directory) in words and "swin_moe" in words:
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    "number, ranks",
    [
        (signal.SIGTERM, 2),
        (signal.SIGUSR1, 2),
        pytest.param(signal.SIGHUP, 2, marks=pytest.mark.full),  # the launcher passes it on as it does SIGTERM
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.full),  # this too, and below it comes twice
        (signal.SIGTERM, 0),
        (signal.SIGHUP, 0),
        (signal.SIGINT, 0),
    ],
)
def test_signal_saves_and_exits_cleanly(tmp_path, start, number, ranks):
    words = command(tmp_path, "optim.epochs=500", ranks=ranks)
    process = start(words)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output  # not 0, which a finished run has
    # Whatever MPI passes on in its place.
    assert f"stopped by {number.name} at" in output and "Traceback" not in output and "Abort" not in output
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert checkpoints(tmp_path)[-1] == f"{last:010d}"


@pytest.mark.parametrize("ranks", [0, 2])
def test_ctrl_c_twice_ends_at_once_and_keeps_what_was_saved(tmp_path, start, ranks):
    words = command(tmp_path, "optim.epochs=500", "checkpoint.every=2", "engine.timeout=30", ranks=ranks)
    process = start(words)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode in (75, 130), output  # 75: it was quicker to save
    assert "Traceback" not in output
    assert checkpoints(tmp_path)


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_kill_9_leaves_no_orphan_and_the_next_run_resumes(tmp_path, start, capfd, victim):
    words = command(tmp_path, "optim.epochs=500", "checkpoint.every=2", "checkpoint.keep=2", ranks=2)
    process = start(words, anew=True)
    wait_for_step(process, tmp_path, 5)
    if victim == "launcher":
        process.kill()
    else:
        os.kill(max(ranks_of(tmp_path)), signal.SIGKILL)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while ranks_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks_of(tmp_path)
    step = int(checkpoints(tmp_path)[-1])
    assert step >= 4
    longer = f"optim.epochs={(step + 1.5) / 44}"
    if victim == "launcher":  # goes on with one rank, in this process
        assert f"resumed from step {step}" in perform("train", tmp_path, capfd, longer)
        return
    resumed = run(command(tmp_path, longer, ranks=2))
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from step {step}" in resumed.stdout


@pytest.mark.full
@pytest.mark.parametrize("seed", range(12))
def test_kill_9_at_a_random_moment(tmp_path, seed):
    draw = random.Random(seed)
    options = ("optim.epochs=1", "checkpoint.every=1", "checkpoint.keep=2")
    words = command(tmp_path, *options, ranks=2)
    for _ in range(2):
        with subprocess.Popen(
            words, env=environment(anew=True), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as job:
            time.sleep(draw.uniform(0, 12))
            victims = [job.pid, *ranks_of(tmp_path)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(victims), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while ranks_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not ranks_of(tmp_path)
    before = checkpoints(tmp_path)
    done = run(words)
    assert done.returncode == 0, done.stderr
    if before:
        assert f"resumed from step {int(before[-1])}" in done.stdout or "already finished" in done.stdout
    assert checkpoints(tmp_path)[-1] == "0000000045"


def test_corrupt_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, capfd):
    perform("train", tmp_path, capfd, "checkpoint.every=2")
    newest = tmp_path / "run" / "checkpoints" / "0000000005"
    shard = next(newest.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    out = perform("train", tmp_path, capfd, "optim.epochs=0.17")
    assert "0000000005" in out and "resumed from step 4" in out


# A program that finds its world under plain mpirun: tests/launcher/failure/test_faults.py.
@pytest.mark.parametrize("start", [pytest.param("mpirun", marks=pytest.mark.full), "torchrun"])
def test_other_launchers(tmp_path, start):
    program = ["-m", "swin_moe.train", "digits_swin_moe", *QUICK, f"run.output={tmp_path}"]
    if start == "mpirun":
        words = [str(Path(PYTHON).parent / "mpirun"), "-n", "2", PYTHON, *program]
    else:
        words = [
            PYTHON,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-addr=127.0.0.1",
            f"--master-port={free_port()}",
            *program,
        ]
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert "2 ranks = 2 expert" in done.stdout


def test_deepspeed_trains_in_one_process_without_a_launcher(tmp_path):
    """The library asserts LOCAL_RANK, which only a launcher sets."""
    pytest.importorskip("deepspeed")
    done = run(command(tmp_path, "engine.name=deepspeed", "parallel.zero=1", "optim.epochs=0.03"), timeout=120)
    assert done.returncode == 0 and "finished: step 1 of 1" in done.stdout, done.stderr

"""What a start costs: commands that need no torch, the import, the first step of the demo, the measuring of `auto`.

    python benchmarks/launching/start_up.py [--rounds 5] [--only commands,imports,demo,auto]

Every start is a process of its own; rounds take turns over all rows of a table. CPU seconds are of the process and all
that it started, so that other work on the machine adds little; wall seconds are the smallest of the rounds. Modules are
compiled by a first start that is not counted. "torch" says whether the process imported it.

The first step is that of `digits_swin_moe` on one rank: from the start of the process to its first row of metrics.
`auto` measures in an empty cache, then again in a new process with the cache, then with another network of the same
widths, windows and batch.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-X", "importtime", "-m", "swin_moe.cli"]

AUTO = """
import logging, sys, time
import torch, swin_moe
torch.set_num_threads(1)
messages = []
class Kept(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("swin_moe").addHandler(Kept())
logging.getLogger("swin_moe").setLevel(logging.INFO)
model = swin_moe.create_model(sys.argv[1])
images = torch.randn(8, 3, *model.img_size)
seconds = []
for _ in range(2):
    start = time.process_time()
    out = model(images)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    seconds.append(time.process_time() - start)
known = sum("measured before" in m for m in messages)
print(sum("model.attention=auto" in m for m in messages) - known, known, seconds[0] - seconds[1])
"""


def environment(cache: Path) -> dict[str, str]:
    """Returns that of a start: this source, one thread, a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}


def start(command: list[str], cache: Path) -> tuple[float, float, subprocess.CompletedProcess]:
    """Returns (wall seconds, CPU seconds of the process and its children, what it said)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(command, cwd=cache, env=environment(cache), capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended


def compare(rows: dict[str, list[str]], cache: Path, rounds: int) -> None:
    """Prints a table of starts."""
    found: dict[str, list[tuple[float, float, subprocess.CompletedProcess]]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, command in rows.items():
            ended = start(command, cache)
            if number:
                found[name].append(ended)
    print("| start | exit code | CPU s, median | wall s, smallest | torch |\n|---|---|---|---|---|")
    for name, ends in found.items():
        last = ends[-1][2]
        imported = any(line.endswith(" torch") for line in last.stderr.splitlines())
        cpu, wall = statistics.median(cpu for _, cpu, _ in ends), min(wall for wall, _, _ in ends)
        print(f"| {name} | {last.returncode} | {cpu:.3f} | {wall:.3f} | {'yes' if imported else 'no'} |", flush=True)


def checkpoint_of(cache: Path) -> Path:
    """Returns a checkpoint of a small network; raises CalledProcessError where training fails."""
    words = ["debug/synthetic_swin_moe", "optim.epochs=1", "optim.warmup_epochs=0", "log.tensorboard=false"]
    command = [sys.executable, "-m", "swin_moe.train", *words, f"run.output={cache}", "run.name=small"]
    subprocess.run(command, cwd=cache, env=environment(cache), capture_output=True, check=True)
    return max((cache / "small" / "checkpoints").glob("0*"))


def compare_commands(cache: Path, rounds: int) -> None:
    """Prints what commands cost that need no torch, right and wrong ones."""
    saved = str(checkpoint_of(cache))
    config = "swin_tiny_patch4_window7_224"
    rows = {
        "--help": ["--help"],
        "train --help": ["train", "--help"],
        "an unknown command": ["trian"],
        "train, unknown config": ["train", "swin_tony"],
        "train, unknown option": ["train", config, "optim.lrr=1"],
        "train, value out of range": ["train", config, "optim.lr=-1"],
        "plan, unknown option": ["plan", config, "--wrold", "8"],
        "configs": ["configs"],
        "show": ["show", config],
        "checkpoint --help": ["checkpoint", "--help"],
        "checkpoint inspect": ["checkpoint", "inspect", saved],
        "checkpoint verify": ["checkpoint", "verify", saved],
        "checkpoint diff": ["checkpoint", "diff", saved, saved],
        "checkpoint inspect, no such": ["checkpoint", "inspect", str(cache / "nothing")],
    }
    compare({f"`swin-moe {' '.join(name.split())}`": [*CLI, *words] for name, words in rows.items()}, cache, rounds)


def compare_imports(cache: Path, rounds: int) -> None:
    """Prints what imports cost beside that of torch alone."""
    python = [sys.executable, "-X", "importtime", "-c"]
    lines = ("import torch", "import torch, swin_moe", "import swin_moe", "import swin_moe; swin_moe.create_model",
             "import swin_moe.train")  # fmt: skip
    compare({f"`{line}`": [*python, line] for line in lines}, cache, rounds)


def first_step(cache: Path, rounds: int) -> None:
    """Prints when the demo's first step is done, and what it cost until then."""
    walls, costs = [], []
    for number in range(rounds + 1):
        words = [
            "digits_swin_moe",
            "log.every=1",
            "log.tensorboard=false",
            f"run.output={cache}",
            f"run.name=d{number}",
        ]
        said = cache / f"d{number}" / "metrics.jsonl"
        began = time.perf_counter()
        command = [sys.executable, "-m", "swin_moe.train", *words]
        with subprocess.Popen(command, cwd=cache, env=environment(cache), stdout=-3, stderr=-3) as process:
            while not (said.exists() and said.stat().st_size) and process.poll() is None:
                time.sleep(0.02)
            wall = time.perf_counter() - began
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            process.kill()
        if number:
            walls.append(wall)
            costs.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    print("| demo | CPU s, median | wall s, smallest |\n|---|---|---|")
    print(f"| start to the first step's metrics | {statistics.median(costs):.2f} | {min(walls):.2f} |", flush=True)


def measuring(cache: Path) -> None:
    """Prints what `auto` costs a whole network: the first training step less the second, CPU seconds."""
    print(
        "| network, batch 8, training | cases measured | found on disk | CPU s over the next step |\n|---|---|---|---|"
    )
    swin, second = "swin_tiny_patch4_window7_224", "swinv2_tiny_patch4_window8_256"
    for name in (swin, swin, "swin_small_patch4_window7_224", second, second):
        ended = start([sys.executable, "-c", AUTO, name], cache)[2]
        measured, known, seconds = ended.stdout.split()
        print(f"| {name} | {measured} | {known} | {float(seconds):.2f} |", flush=True)


def main() -> None:
    """Prints markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="commands,imports,demo,auto", help="parts, comma-separated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        for part in options.only.split(","):
            print(f"\n{part}\n")
            if part == "commands":
                compare_commands(cache, options.rounds)
            elif part == "imports":
                compare_imports(cache, options.rounds)
            elif part == "demo":
                first_step(cache, options.rounds)
            else:
                measuring(cache)


if __name__ == "__main__":
    main()

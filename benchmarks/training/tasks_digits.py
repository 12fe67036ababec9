"""Does every training task learn? The digits, end to end, on 2 MPI ranks, over seeds.

    python benchmarks/training/tasks_digits.py [--seeds 3] [--ranks 2] [--tasks simmim ...] [--output DIR]

Every number is of the last epoch, not of the best one, because the 360 test images must not pick the checkpoint. Rows
that are compared differ in nothing but what their names say: the same images, steps, augmentation and evaluation.
CPU minutes are user + system time of all processes of the task, start-up included.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, float]


class Runs:
    """Runs of one task and seed, as a user would start them."""

    def __init__(self, output: Path, ranks: int, seed: int) -> None:
        self.output, self.ranks, self.seed = output, ranks, seed

    def train(self, name: str, config: str, *options: str) -> Row:
        """Returns the last evaluation of a run; its directory is `directory(name)`."""
        self._start("swin_moe.train", name, config, *options, "log.tensorboard=false")
        lines = (self.output / name / "metrics.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if "eval/samples" in r][-1]

    def features(self, name: str, config: str, *options: str) -> Row:
        """Returns {"knn": percent, "few_shot": percent, ...} of a run's features."""
        printed = self._start("swin_moe.evaluate_features", name, config, *options, "--l2", "10")
        return {key: float(value) for key, value in re.findall(r"(\w+) ([\d.]+)(?:,|$)", printed.splitlines()[-1])}

    def directory(self, name: str) -> Path:
        """Returns where a run lies."""
        return self.output / name

    def _start(self, module: str, name: str, config: str, *options: str) -> str:
        command = [sys.executable, "-m", "launcher", "-n", str(self.ranks), "--", "-m", module, config]
        command += [f"run.seed={self.seed}", f"run.output={self.output}", f"run.name={name}", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return done.stdout.strip()


def simmim(runs: Runs) -> Row:
    """Masked image modelling, then fine-tuning with 5 labels a class, against the same training from the seed."""
    pretrained = runs.train("simmim", "digits_simmim")
    tuned = runs.train("tuned", "digits_few_labels", f"checkpoint.init={runs.directory('simmim')}")
    scratch = runs.train("scratch", "digits_few_labels")
    return {
        "masked loss": pretrained["eval/loss"],
        "of the mean": pretrained["eval/mean_loss"],
        "fine-tuned %": tuned["eval/top1"],
        "from scratch %": scratch["eval/top1"],
    }


STUDENT = ("model.embed_dim=12", "model.depths=[2,2]", "model.num_heads=[1,2]")  # as digits_student


def distill(runs: Runs) -> Row:
    """A student distilled and then tuned, against the same student that trains alone: few labels, and all of them.

    With all labels the one alone gets the epochs of distillation too.
    """
    teacher = runs.train("teacher", "digits_dense", "optim.epochs=30")
    student = runs.train("distilled", "digits_distill", f"task.distill.teacher={runs.directory('teacher')}")
    init = f"checkpoint.init={runs.directory('distilled')}"
    return {
        "teacher %": teacher["eval/top1"],
        "feature loss": student["eval/loss"],
        "of the mean": student["eval/mean_loss"],
        "5 labels %": runs.train("few", "digits_few_labels", *STUDENT, init)["eval/top1"],
        "5 labels, alone %": runs.train("few-alone", "digits_few_labels", *STUDENT)["eval/top1"],
        "all labels %": runs.train("all", "digits_student", init, "optim.epochs=20")["eval/top1"],
        "all labels, alone %": runs.train("all-alone", "digits_student", "optim.epochs=50")["eval/top1"],
    }


def moby(runs: Runs, *encoder: str) -> Row:
    """Contrastive pre-training, then a linear probe, against the same probe of a random encoder."""
    runs.train("moby", "digits_moby", *encoder)
    probe = runs.train("probe", "digits_probe", *encoder, f"checkpoint.init={runs.directory('moby')}")
    random = runs.train("random", "digits_probe", *encoder)
    measured = runs.features("moby", "digits_moby", *encoder)
    return {
        "linear probe %": probe["eval/top1"],
        "of a random encoder %": random["eval/top1"],
        "20 neighbours %": measured["knn"],
        "5 labels, ridge %": measured["few_shot"],
    }


def moby_coarse(runs: Runs) -> Row:
    """The same with digits_dense's blocks on 4 x 4 tokens, whose random features tell digits apart."""
    return moby(runs, "model.patch_size=4", "model.embed_dim=48", "model.depths=[2,4]", "model.num_heads=[3,6]")


TASKS: dict[str, Callable[[Runs], Row]] = {
    "simmim": simmim,
    "distill": distill,
    "moby": moby,
    "moby_coarse": moby_coarse,
}


def cpu_seconds() -> float:
    """Returns user + system seconds of all finished children and their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Prints a markdown table per task, a line per seed, then mean and spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--output", type=Path, help="keep the runs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for task in options.tasks:
            rows: list[Row] = []
            for seed in range(options.seeds):
                start, cpu = time.monotonic(), cpu_seconds()
                output = (options.output or Path(temporary)) / task / f"seed{seed}"
                row = TASKS[task](Runs(output, options.ranks, seed))
                row |= {"wall s": time.monotonic() - start, "CPU minutes": (cpu_seconds() - cpu) / 60}
                if not rows:
                    print(f"\n| {task}, seed | {' | '.join(row)} |\n|{'---|' * (len(row) + 1)}")
                rows.append(row)
                print(f"| {seed} | {' | '.join(f'{value:.4g}' for value in row.values())} |", flush=True)
            columns = list(zip(*(row.values() for row in rows)))
            print(f"| mean | {' | '.join(f'{statistics.mean(column):.4g}' for column in columns)} |")
            print(f"| spread | {' | '.join(f'{max(column) - min(column):.3g}' for column in columns)} |", flush=True)


if __name__ == "__main__":
    main()

"""Accuracy and cost of the demo and of its dense twin, over seeds, on 2 MPI ranks.

    python benchmarks/training/digits.py [--seeds 3] [--ranks 2] [--configs digits_swin_moe digits_dense]

Every run is `python -m launcher -n RANKS -- -m swin_moe.train CONFIG run.seed=S`. The accuracy is that of the last
epoch, not of the best one, because the 360 test images must not pick the checkpoint. CPU minutes are user + system time
of all processes of a run, start-up included.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cpu_seconds() -> float:
    """Returns user + system seconds of all finished children and their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(config: str, seed: int, ranks: int, output: str) -> dict[str, float]:
    """Returns the last evaluation of one run, with its cost."""
    name = f"{config}-{seed}"
    command = [sys.executable, "-m", "launcher", "-n", str(ranks), "--", "-m", "swin_moe.train", config]
    command += [f"run.seed={seed}", f"run.output={output}", f"run.name={name}", "log.tensorboard=false"]
    start, cpu = time.monotonic(), cpu_seconds()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    cost = {"wall": time.monotonic() - start, "cpu": cpu_seconds() - cpu}
    records = [json.loads(line) for line in (Path(output) / name / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "eval/top1" in r][-1] | cost


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--configs", nargs="+", default=["digits_swin_moe", "digits_dense"])
    options = parser.parse_args()
    print("| config | seed | test accuracy % | test loss | wall s | CPU minutes |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as output:
        for config in options.configs:
            results = []
            for seed in range(options.seeds):
                result = run(config, seed, options.ranks, output)
                results.append(result)
                print(
                    f"| {config} | {seed} | {result['eval/top1']:.2f} | {result['eval/loss']:.4f} "
                    f"| {result['wall']:.0f} | {result['cpu'] / 60:.1f} |",
                    flush=True,
                )
            accuracies = [r["eval/top1"] for r in results]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            print(f"| {config} | mean | {statistics.mean(accuracies):.2f} (standard deviation {spread:.2f}) | | | |")


if __name__ == "__main__":
    main()

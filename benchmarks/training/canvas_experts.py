"""Does a detector learn on a Swin-MoE backbone: experts trained, frozen, MoE layers frozen, beside dense?

    python benchmarks/training/canvas_experts.py OUTPUT [--seeds 0 1 2] [--rows moe-scratch ...]

Runs debug/canvas_swin_moe from scratch and from a classifier of the same digits (debug/digits_canvas_backbone), one
rank, one thread, one row after the other, seed by seed. A row that is whole is not run again, one that was cut off goes
on from its checkpoint, so the same command continues a sweep. Prints a table; CPU seconds are those of the process, of
the last start alone where a row was continued.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DENSE = "model.moe.blocks=[[],[],[],[]]"
# Row -> (the classifier it begins with, or none; what it has otherwise than the config).
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "moe-scratch": ("", ()),
    "moe-tuned": ("pre-moe", ()),
    "moe-frozen": ("pre-moe", ("optim.freeze=moe",)),
    "dense-scratch": ("", (DENSE,)),
    "dense-tuned": ("pre-dense", (DENSE,)),
    "experts-frozen": ("pre-moe", ("optim.freeze=experts",)),
}
BEFORE = {"pre-moe": (), "pre-dense": (DENSE,)}


def trained(output: Path, name: str, config: str, *options: str) -> dict:
    """Returns the last evaluation of a run, which is made or continued where it is not whole, with its CPU seconds."""
    done = output / name / "row.json"
    if done.exists():
        return json.loads(done.read_text())
    command = [sys.executable, "-m", "swin_moe", "train", config, f"run.output={output}", f"run.name={name}", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "log.tensorboard=false"], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = map(json.loads, (output / name / "metrics.jsonl").read_text().splitlines())
    row = [line for line in lines if "eval/samples" in line][-1]
    row["cpu_s"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    done.write_text(json.dumps(row))
    return row


def main() -> None:
    """Runs what is missing, then prints every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    given = parser.parse_args()
    for seed in given.seeds:
        for row in given.rows:
            first, options = ROWS[row]
            if first:
                name = f"{first}-{seed}"
                found = trained(given.output, name, "debug/digits_canvas_backbone", f"run.seed={seed}", *BEFORE[first])
                print(f"| {seed} | {first} | top1 {found['eval/top1']:.1f} | | | | {found['cpu_s']} |", flush=True)
                options += (f"checkpoint.init={given.output / name}",)
            found = trained(given.output, f"{row}-{seed}", "debug/canvas_swin_moe", f"run.seed={seed}", *options)
            keys = ("box_AP", "box_AP50", "box_AP75", "mask_AP")
            cells = " | ".join(f"{found[f'eval/{key}']:.1f}" for key in keys)
            print(f"| {seed} | {row} | {cells} | {found['cpu_s']} |", flush=True)


if __name__ == "__main__":
    main()

"""What int8 costs in accuracy: runs evaluated by swin_moe.optimize in float32, bfloat16 and int8, on all test images.

    python benchmarks/training/int8_accuracy.py [--noise 1.0] output/digits_dense output/digits_swin_moe ...

A row for each run and form: accuracy, images whose class is that of float32, the largest and the mean difference of a
logit from float32's, and the standard deviation of the logits, all images together, in the batches of `evaluate`.
--noise adds normal noise of that standard deviation to the normalized pixels, for images near the borders of classes.
"""

import argparse

import torch
from torch import Tensor

import swin_moe
from swin_moe.evaluate import build_eval_loader
from swin_moe.run.session import open_session

FORMS: dict[str, dict] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8, the rest float32": {"int8": True},
    "int8, the rest bfloat16": {"int8": True, "dtype": torch.bfloat16},
}


def evaluated(run: str, noise: float) -> tuple[dict[str, Tensor], Tensor]:
    """Returns (name of a form -> logits (N, K), labels (N)) of a run's test set."""
    session = open_session(f"{run}/config.yaml", [f"checkpoint.load={run}"])
    batches = list(build_eval_loader(session.config, session))
    model = swin_moe.load(run)[0].eval()
    labels = torch.cat([batch["target"] for batch in batches])
    draw = torch.Generator().manual_seed(0)
    images = [batch["image"] + noise * torch.randn(batch["image"].shape, generator=draw) for batch in batches]
    found = {}
    for name, options in FORMS.items():
        form = swin_moe.optimize(model, **options)
        found[name] = torch.cat([form(image) for image in images])
    return found, labels


def main() -> None:
    """Prints a row for each run and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of runs")
    parser.add_argument("--noise", type=float, default=0.0)
    options = parser.parse_args()
    print("| run | form | top-1 % | same class | largest difference | mean | logits' deviation |")
    print("|---|---|---|---|---|---|---|")
    for run in options.runs:
        found, labels = evaluated(run, options.noise)
        exact = found["float32"]
        for name, logits in found.items():
            right = (logits.argmax(1) == labels).float().mean()
            same = int((logits.argmax(1) == exact.argmax(1)).sum())
            away = (logits - exact).abs()
            cells = f"{100 * right:.2f} | {same} of {len(labels)} | {away.max():.4f} | {away.mean():.5f}"
            print(f"| {run.rstrip('/').rsplit('/', 1)[-1]} | {name} | {cells} | {exact.std():.2f} |", flush=True)


if __name__ == "__main__":
    main()

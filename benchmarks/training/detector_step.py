"""A training step and the evaluation of the digits detector, and the same written plainly in torch, alternately.

    python benchmarks/training/detector_step.py [--steps 25] [--rounds 3]

configs/debug/canvas_mask_rcnn.yaml on one thread: a step is forward, losses, backward, clipping and AdamW (fused) on
the same four canvases; ours is the training loop's own step. Evaluation is that of 60 canvases: forward, suppression
and masks pasted into the images; measuring them by COCO's rules, which is the same on both sides, is left out. Plain is
plain_detector.py with the same weights. Times are medians of processor time, ratios medians over pairs, so
that a busy machine disturbs both alike; above 1: ours is faster.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import plain_detector as plain
import torch
from torch import Tensor

from swin_moe.config.io import load_config
from swin_moe.data.batch import Batch
from swin_moe.parallel.groups import single_process_groups
from swin_moe.run.session import Session
from swin_moe.tasks.base import StepContext
from swin_moe.tasks.detect import Detect
from swin_moe.train import Trainer

OPTIONS = ("log.tensorboard=false", "log.eval_every=0", "data.workers=0")


def milliseconds(call: Callable[[], object]) -> float:
    """Returns the processor time of a call."""
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    """Prints a row; both have run once before."""
    for call in (ours, theirs):
        call()
    pairs = [(milliseconds(ours), milliseconds(theirs)) for _ in range(rounds)]
    own, other = (statistics.median(column) for column in zip(*pairs))
    ratios = sorted(b / a for a, b in pairs)
    spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f}"
    print(f"| {name} | {other:.1f} | {own:.1f} | {statistics.median(ratios):.2f} ({spread}) |", flush=True)


def plain_step(weights: dict[str, Tensor], batch: Batch) -> Callable[[], object]:
    """Returns a training step of the plain network."""
    params = {name: value.clone().requires_grad_() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.05, fused=True)
    truth = list(zip(batch["boxes"], batch["labels"], batch["masks"]))

    def step() -> None:
        plain.losses(params, plain.Numbers(), batch["image"], batch["size"], truth).backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3, help="of evaluations")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("canvas_mask_rcnn", [*OPTIONS, f"run.output={folder}"])
        trainer = Trainer(Session(config, single_process_groups(), torch.device("cpu")))
        trainer.resume()
        weights = {name: p.detach().clone() for name, p in trainer.engine.local_model.named_parameters()}
        (batches,) = list(trainer.loader.batches(0, 1))
        (batch,) = batches.batches
        context = StepContext(config, 0, 1, 4, trainer.engine.autocast)
        print(
            f"torch {torch.__version__}\n\n| what | plain torch, ms | ours, ms | ratio (quartiles) |\n|---|---|---|---|"
        )

        def step() -> None:
            trainer.micro_steps.run(batches, context)
            trainer.engine.step(0)

        compare("training step, 4 canvases", step, plain_step(weights, batch), options.steps)
        model, task = trainer.engine.local_model.eval(), trainer.task
        assert isinstance(task, Detect)
        with torch.no_grad():  # the weights as they began: both find the same
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        validation = list(trainer.eval_loader)

        def evaluate() -> None:
            for one in validation:
                task.look(model, one, replace(context, num_samples=len(one["image"])))

        def plainly() -> None:
            for one in validation:
                found = plain.detect(weights, plain.Numbers(), one["image"], one["size"])
                for boxes, _, _, masks in found:
                    plain.paste(masks, boxes, 64, 64)

        compare("evaluation of 60 canvases", evaluate, plainly, options.rounds)
        trainer.loader.close()


if __name__ == "__main__":
    main()

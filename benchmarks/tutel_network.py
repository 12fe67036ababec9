"""One training step of Swin-MoE-S, ours against the same network with Tutel's layers in the place of its own.

    OMP_NUM_THREADS=1 python benchmarks/tutel_network.py [--tutel FOLDER] [--batch 8] [--rounds 5]
        [--precisions fp32,bf16]

FOLDER is what Tutel is imported from where it is not installed. The other network is ours but for what is between a
block's norm and its residual sum: router, choice, dispatch, experts and loss are Tutel's, with the official options
(top-1, capacity 1.25, confident tokens first, noise, load and importance). Logits in evaluation are compared first.

A step is forward, cross entropy, backward and AdamW (fused); both take turns on one thread. CPU times are medians over
rounds, the ratio the median of a round's ratios, above 1: ours is faster.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from device_clock import seconds_per_call
from torch import Tensor, nn
from train_step import MOE, Side

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
from moe_peers import CPU, tutel_layer  # noqa: E402

import swin_moe  # noqa: E402
from swin_moe.moe.layer import MoELayer  # noqa: E402
from swin_moe.parallel.groups import init_distributed  # noqa: E402

SIZE = 192
ALLOWED = 1e-4  # of the norm of the logits, in float32


class TutelLayer(MoELayer):
    """A layer that computes by Tutel, with the weights and options of one of ours."""

    def __init__(self, layer: MoELayer) -> None:
        nn.Module.__init__(self)
        self.config, self.choice, self.peer = layer.config, layer.choice, tutel_layer(layer)

    def _compute(self, x_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        y = self.peer(x_TD)
        return y, self.config.aux_loss_weight * self.peer.l_aux


def with_tutel(model: nn.Module) -> nn.Module:
    """Returns a copy of a network whose MoE layers compute by Tutel."""
    model = copy.deepcopy(model)
    for block in list(model.modules()):
        layer = getattr(block, "mlp", None)
        if isinstance(layer, MoELayer):
            block.mlp = TutelLayer(layer)
    return model


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Returns those of evaluation."""
    with torch.no_grad():
        return model.eval()(images)[0]


def compare(precision: str, options: argparse.Namespace) -> None:
    """Prints the row of a precision."""
    ours = swin_moe.create_model(MOE, num_classes=1000)
    images = torch.randn(options.batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    theirs = with_tutel(ours)
    mine, other = logits(ours, images), logits(theirs, images)
    differs = float((mine - other).norm() / mine.norm())
    if not differs < ALLOWED:
        raise RuntimeError(f"logits differ by {differs:.1e} of their norm")
    sides = [Side(model, images, precision) for model in (ours, theirs)]
    for side in sides:
        side.train()
    times: list[list[float]] = [[], []]
    for number in range(options.rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(seconds_per_call(sides[which].train, CPU, 1))
    medians = [1e3 * statistics.median(side) for side in times]
    ratio = statistics.median(b / a for a, b in zip(*times))
    print(f"| {precision} | {medians[0]:.0f} | {medians[1]:.0f} | {ratio:.2f} | {differs:.1e} |", flush=True)


def main(argv: list[str]) -> None:
    """Prints a row per precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tutel")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["fp32", "bf16"])
    options = parser.parse_args(argv)
    if options.tutel:
        sys.path.insert(0, options.tutel)
    torch.set_num_threads(1)
    init_distributed(CPU)
    print(
        "| precision | ours, ms a step | by Tutel, ms | ratio | logits differ by |\n|---|---|---|---|---|", flush=True
    )
    for precision in options.precisions:
        compare(precision, options)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Routing of a MoE layer, forward and backward: the compiled operators against the Python form, on one thread.

    python benchmarks/kernels/routing.py [--repeats 15]

From logits to routing, losses, statistics and the order of rows, and the gradients of gates and losses. Both forms run
alternately in one process; printed are medians in milliseconds of processor time, which other programs hardly change,
and their ratio (above 1: the operators are faster).
"""

import argparse
import statistics
import time
from unittest import mock

import torch

from swin_moe.config import MoEConfig
from swin_moe.moe.choices import Choice, build_choice
from swin_moe.moe.dispatch import make_order
from swin_moe.moe.routers import build_router
from swin_moe.ops.moe import moe_plan, moe_route

TOKENS_PER_IMAGE = 64
# Name -> images, experts, choices, options.
SHAPES = {
    "demo, stage 1": (64, 8, 1, {"capacity_scope": "images", "group_images": 16}),
    "demo, stage 2": (16, 8, 1, {"capacity_scope": "images", "group_images": 4}),
    **{f"T 18432, E {e}, top-{k}": (288, e, k, {}) for e in (8, 32, 128) for k in (1, 2)},
    "T 18432, E 32, gshard by token": (288, 32, 2, {"balance_loss": "gshard", "batch_prioritized": False}),
}


class Case:
    """A rule, its logits with and without noise, and one step of it."""

    def __init__(self, images: int, experts: int, top_k: int, options: dict) -> None:
        config = MoEConfig(num_experts=experts, top_k=top_k, **options)
        self.choice = build_choice(config, 1)
        self.router = build_router(8, config)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(images * TOKENS_PER_IMAGE, 8, generator=generator)
        self.clean = torch.randn(len(self.x), experts, generator=generator).requires_grad_()
        self.noise = torch.randn(len(self.x), experts, generator=generator) / experts

    def step(self) -> None:
        """Routes and differentiates; the router's product and the noise are not part of it."""
        with (
            mock.patch.object(type(self.router), "forward", lambda *_: self.clean),
            mock.patch.object(Choice, "add_noise", lambda *_: self.clean + self.noise),
        ):
            routed = self.choice.route(
                self.x, self.router, tokens_per_image=TOKENS_PER_IMAGE, training=True, random=None, token=None
            )
        make_order(routed.routing, int(routed.stats.kept.sum()))
        (routed.routing.gate.sum() + routed.aux).backward()
        self.clean.grad = None

    def time(self, fused: bool) -> float:
        """Returns the milliseconds of a step."""
        with mock.patch.object(moe_route, "available", lambda _: fused):
            with mock.patch.object(moe_plan, "available", lambda _: fused):
                start = time.thread_time()
                self.step()
                return (time.thread_time() - start) * 1e3


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if "cpu" not in moe_route.COMPILED:
        raise SystemExit("the compiled kernels are missing")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.repeats} repeats\n")
    print("| shape | Python form, ms | operators, ms | ratio |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        case = Case(*shape)
        times: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(options.repeats + 2):
            for fused in times:
                spent = case.time(fused)
                if repeat >= 2:
                    times[fused].append(spent)
        old, new = (statistics.median(values) for values in times.values())
        print(f"| {name} | {old:.2f} | {new:.2f} | {old / new:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""Prints the planner's images per second beside those that arXiv:2206.03382 (Tutel, MLSys 2023) publishes, and every
residual. Nothing here is fitted to them. docs/scaling.md says what they mean.

    python benchmarks/planner/planner_published.py [--json FILE]

What the paper says of its runs: Azure ND96amsr_A100_v4 (8 A100 SXM of 80 GB, a 200 Gbit/s HDR port each, NVLink 3),
PyTorch 1.8.0, NCCL 2.10.3, images of 192 x 192, E = 32, k = 1, f = 1.0; in Table 7 one expert a GPU. It does not say
precision, batch or whether speeds are of one GPU: fp16 autocast and 128 images a GPU are the official recipe's, and
only speeds of one GPU are possible (288 images/s of a whole machine would be 1 % of its arithmetic).
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from eager_swinv2 import Network, seconds
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from swin_moe.config import MoEConfig
from swin_moe.config.io import load_config
from swin_moe.moe import MoELayer
from swin_moe.parallel.sharding import Degrees
from swin_moe.planner.exchange import EvenDispatcher
from swin_moe.planner.hardware import load_hardware
from swin_moe.planner.layouts import Layout
from swin_moe.planner.micro_step import trace_micro_step
from swin_moe.planner.step_time import predict_time
from swin_moe.planner.trace import LiveBytes
from swin_moe.planner.workload import build_workload
from swin_moe.randomness import RandomContext

IMAGES = 128
A100 = load_hardware("a100_80")
# Table 7: GPUs -> images/s in training and inference, dense SwinV2-B and SwinV2-MoE-B by Tutel.
TABLE_7 = {
    8: ((291, 1198), (274, 1053)),
    16: ((290, 1198), (253, 943)),
    32: ((288, 1195), (249, 892)),
    64: ((285, 1187), (234, 835)),
    128: ((256, 1103), (226, 792)),
}
# Table 11: (size, experts, k, f) -> images/s in training and inference; 0 experts = dense. On 32 GPUs, or as many as
# there are experts where these are more.
TABLE_11 = {
    ("small", 0, 1, 1.0): (350, 1604),
    ("small", 8, 1, 1.0): (292, 1150),
    ("small", 16, 1, 1.0): (295, 1153),
    ("small", 32, 1, 1.0): (295, 1159),
    ("small", 64, 1, 1.0): (288, 1083),
    ("small", 128, 1, 1.0): (273, 1027),
    ("base", 0, 1, 1.0): (288, 1195),
    ("base", 8, 1, 1.0): (247, 893),
    ("base", 16, 1, 1.0): (246, 889),
    ("base", 32, 1, 1.0): (249, 892),
    ("base", 32, 2, 1.0): (206, 679),
    ("base", 32, 2, 0.625): (227, 785),
}
# Tables 5 and 9: tokens a GPU -> GiB of one MoE layer by Tutel, D = H = 4096, top-2, two experts a GPU.
TABLE_5 = {4096: 2.9, 8192: 3.2, 16384: 4.0, 32768: 5.7}


@dataclass(frozen=True)
class Row:
    """One published speed in images/s of a GPU, and what stands beside it."""

    table: int
    size: str
    experts: int
    top_k: int
    capacity: float
    gpus: int
    inference: bool
    published: float
    ours: float  # the planner's, of this project's own program
    eager: float  # of the eager program (eager_swinv2.py), with what the planner adds for experts
    dense: float = 0.0  # published, of the dense model; 0 where this is it
    dense_eager: float = 0.0

    @property
    def residual(self) -> float:
        return self.eager / self.published - 1

    @property
    def ratio_residual(self) -> float:
        """Of speed over the dense model's."""
        return (self.eager / self.dense_eager) / (self.published / self.dense) - 1 if self.dense else 0.0


class Predictions:
    """Seconds of a micro-batch, found once each."""

    def __init__(self) -> None:
        self._traced: dict[tuple, tuple] = {}
        self._eager: dict[tuple[str, bool], float] = {}

    def ours(self, size: str, experts: int, top_k: int, capacity: float, gpus: int) -> tuple[float, float]:
        """Returns (training step, forward) seconds on these GPUs."""
        name = f"swin_moe_{size}_patch4_window12_192_" + ("32expert_32gpu_22k" if experts else "densebaseline_22k")
        options = ["engine.precision=fp16", "model.attention=reference"]
        if experts:
            options += [
                f"model.moe.{key}={value}"
                for key, value in (
                    ("num_experts", experts),
                    ("top_k", top_k),
                    ("capacity_factor", capacity),
                    ("backend", "padded"),
                )
            ]
        config = load_config(name, options)
        expert = min(experts, gpus) or 1
        # Fewer experts than GPUs: the official files (8expert_32gpu) cut every expert over several, and rows go to all.
        shard = gpus // expert if experts else 1
        layout = Layout(
            gpus, expert, shard, gpus // expert // shard, "torch", 0, "none", 0, IMAGES, 1, 1, "linear", "none", "none"
        )
        chosen = layout.apply(replace(config, data=replace(config.data, global_batch=IMAGES * gpus)))
        key = size, experts, top_k, capacity, expert, shard
        if key not in self._traced:
            self._traced[key] = build_workload(chosen), trace_micro_step(chosen, layout.degrees).at(IMAGES)
        workload, segments = self._traced[key]
        time = predict_time(chosen, A100, workload, layout, segments)
        return time.seconds, time.forward + time.exchange / 2

    def eager(self, size: str, training: bool) -> float:
        """Returns seconds of the eager dense program."""
        key = size, training
        if key not in self._eager:
            dim, macs = {"small": (96, 6.76e9), "base": (128, 11.78e9)}[size]  # Table 11
            self._eager[key] = seconds(IMAGES, Network(dim, (2, 2, 18, 2)), macs, A100, training=training)
        return self._eager[key]

    def rows(
        self, table: int, case: tuple[str, int, int, float], gpus: int, published: tuple, dense: tuple
    ) -> list[Row]:
        """Returns training and inference of one published line."""
        size, experts, *_ = case
        mine, base = self.ours(*case, gpus), self.ours(size, 0, 1, 1.0, gpus)
        found = []
        for inference in (False, True):
            plain = self.eager(size, not inference)
            plain += base[0] - self.ours(size, 0, 1, 1.0, 1)[0] if not inference else 0.0  # reductions
            rate = IMAGES / (plain + mine[inference] - base[inference])
            also = (dense[inference], IMAGES / plain) if experts else (0.0, 0.0)
            found.append(
                Row(table, *case, gpus, inference, published[inference], IMAGES / mine[inference], rate, *also)
            )
        return found


def all_rows() -> list[Row]:
    found, predictions = [], Predictions()
    for gpus, (dense, moe) in TABLE_7.items():
        found += predictions.rows(7, ("base", 0, 1, 1.0), gpus, dense, dense)
        found += predictions.rows(7, ("base", gpus, 1, 1.0), gpus, moe, dense)
    for case, published in TABLE_11.items():
        dense = TABLE_11[case[0], 0, 1, 1.0]
        found += predictions.rows(11, case, max(32, case[1]), published, dense)
    return found


def layer_gib(tokens: int) -> float:
    """Returns GiB of activations of the layer of Table 5 in fp16 at their peak, forward and backward; of 8 ranks."""
    moe = MoEConfig(blocks=((0,),), num_experts=16, top_k=2, capacity_factor=1.0, backend="padded")
    with FakeTensorMode():
        layer = MoELayer(4096, 4096, moe, fc2_bias=True, layer=0, init_std=0.02)
        for name, parameter in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, nn.Parameter(torch.empty((2, *parameter.shape[1:]))))
        layer.dispatcher = EvenDispatcher(moe, Degrees(8, 1, 1), 1.0)
        x = torch.empty(1, tokens, 4096, requires_grad=True)
        with LiveBytes([*layer.parameters(), *layer.buffers()]) as counted:
            with torch.autocast("cpu", dtype=torch.float16):
                y, auxiliary = layer(x, RandomContext(0, 1, torch.empty(1, dtype=torch.int64)))
            (y.sum() + auxiliary).backward()
            counted.end()
    return counted.peak / 2**30


def print_memory() -> None:
    """Prints by how much a layer's memory grows from one number of tokens to the next: what is there without tokens
    (context, communicators, weights) is not published."""
    print("\n| tokens | published GiB | growth | predicted growth | residual |\n|--|--|--|--|--|")
    predicted, least = {tokens: layer_gib(tokens) for tokens in TABLE_5}, min(TABLE_5)
    for tokens, gib in TABLE_5.items():
        if tokens > least:
            grown, ours = gib - TABLE_5[least], predicted[tokens] - predicted[least]
            print(f"| {tokens} | {gib} | {grown:.1f} | {ours:.2f} | {100 * (ours / grown - 1):+.0f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="also write all rows to this file")
    options = parser.parse_args()
    rows = all_rows()
    print("| table | model | GPUs | | published | planner, our program | eager program | residual | of MoE / dense |")
    print("|--|--|--|--|--|--|--|--|--|")
    for r in rows:
        model = (
            f"{r.size[0].upper()} E{r.experts} k{r.top_k} f{r.capacity}" if r.experts else f"{r.size[0].upper()} dense"
        )
        ratio = f"{100 * r.ratio_residual:+.0f} %" if r.dense else ""
        kind = "infer" if r.inference else "train"
        print(
            f"| {r.table} | {model} | {r.gpus} | {kind} | {r.published:.0f} | {r.ours:.0f} | {r.eager:.0f} | "
            f"{100 * r.residual:+.0f} % | {ratio} |"
        )
    print_memory()
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()

"""Seconds of real training steps on one CPU rank beside what the planner says after calibration of this machine.

    python benchmarks/planner/planner_time.py [--rounds N] [--out FILE.md] [--hardware FILE.yaml] [WORD ...]
        [--fresh with|without|only]

Takes steps of every case in turn, in rounds: of those with a WORD in the name if any are given, and of those that
nobody looked at while the planner was mended (FRESH) as well, not or only; all together hold more than 20 GB. It
calibrates, the rounds lying between calibration's networks, so that both meet the same machine (or takes a file that it
wrote).
The median step is compared with what the planner says. Seconds are CPU time of the process with one thread; those on
the wall are beside it. No case is a network that calibration timed. Every case has a process of its own, as a run has:
many networks in one share a heap, which grows and shrinks by what the others left in it, so that a step of SwinV2-T
faulted four times as many pages in.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from swin_moe.config import Config
from swin_moe.config.io import load_config
from swin_moe.planner.calibrate.command import TURNS, Steps, measure_rank
from swin_moe.planner.calibrate.networks import NETWORKS, SmallStep
from swin_moe.planner.hardware import Hardware, load_hardware
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.micro_step import micro_step_here
from swin_moe.planner.step_time import StepTime, predict_time
from swin_moe.planner.workload import build_workload

_MICRO = (
    "model.img_size=96 model.embed_dim=48 model.depths=[2,2,4,2] model.num_heads=[3,6,12,24] model.window_size=6 "
    "model.num_classes=100"
)
_TINY = "model.embed_dim=96 model.depths=[2,2,6,2] model.num_heads=[3,6,12,24] model.num_classes=1000"
_SWIN_T = f"{_TINY} model.name=swin model.img_size=224 model.window_size=7"
_V2_T = f"{_TINY} model.name=swinv2 model.img_size=256 model.window_size=8"
_EXPERTS = (
    "model.name=swin_moe model.moe.blocks=[[-1],[-1],[1,3],[1]] model.moe.num_experts=8 model.moe.capacity_factor=0 "
    "model.moe.capacity_scope=rank"
)
_MOE_SMALL = (
    f"{_EXPERTS} model.embed_dim=96 model.depths=[2,2,4,2] model.num_heads=[3,6,12,24] model.num_classes=1000 "
    "model.img_size=192 model.window_size=6"
)
_BF16, _BLOCK = " engine.precision=bf16", " parallel.recompute=block"
CASES = {
    "Swin micro, batch 16": f"{_MICRO} model.name=swin data.global_batch=16",
    "Swin micro, batch 16, bf16": f"{_MICRO} model.name=swin data.global_batch=16{_BF16}",
    "Swin micro, batch 16 in 4": f"{_MICRO} model.name=swin data.global_batch=16 data.micro_batch=4",
    "SwinV2 micro, batch 16, recomputed": f"{_MICRO} model.name=swinv2 data.global_batch=16{_BLOCK}",
    "Swin-MoE micro, batch 16": f"{_MICRO} {_EXPERTS} data.global_batch=16",
    "Swin-MoE micro, batch 16, bf16": f"{_MICRO} {_EXPERTS} data.global_batch=16{_BF16}",
    "Swin-T, batch 2": f"{_SWIN_T} data.global_batch=2",
    "Swin-T, batch 4, bf16": f"{_SWIN_T} data.global_batch=4{_BF16}",
    "Swin-T, batch 4, bf16, recomputed": f"{_SWIN_T} data.global_batch=4{_BF16}{_BLOCK}",
    "Swin-T, batch 4 in 2, bf16": f"{_SWIN_T} data.global_batch=4 data.micro_batch=2{_BF16}",
    "SwinV2-T, batch 2": f"{_V2_T} data.global_batch=2",
    "SwinV2-T, batch 2, bf16, recomputed": f"{_V2_T} data.global_batch=2{_BF16}{_BLOCK}",
    "Swin-MoE small, batch 2": f"{_MOE_SMALL} data.global_batch=2",
    "Swin-MoE small, batch 2, bf16": f"{_MOE_SMALL} data.global_batch=2{_BF16}",
}
_MLP_T = f"{_TINY} model.name=swin_mlp model.img_size=224 model.window_size=7"
_WINDOW = f"{_TINY} model.name=swinv2 model.img_size=192 model.window_size=12"
COUNTED = 2  # steps of each turn, after one that is not
# Those that nobody looked at while the model of time was made.
FRESH = {
    "Swin-T, batch 1": f"{_SWIN_T} data.global_batch=1",
    "Swin-T, batch 16, bf16": f"{_SWIN_T} data.global_batch=16{_BF16}",
    "Swin-MLP-T, batch 2": f"{_MLP_T} data.global_batch=2",
    "Swin-MLP-T, batch 4, bf16": f"{_MLP_T} data.global_batch=4{_BF16}",
    "SwinV2-T, window 12, batch 4": f"{_WINDOW} data.global_batch=4",
    "SwinV2-T, window 12, batch 2, bf16": f"{_WINDOW} data.global_batch=2{_BF16}",
    "Swin-MoE micro, top-2, batch 16": f"{_MICRO} {_EXPERTS} model.moe.top_k=2 data.global_batch=16",
    "Swin-MoE small, top-2, batch 1, bf16": f"{_MOE_SMALL} model.moe.top_k=2 data.global_batch=1{_BF16}",
    "Swin-MoE small, 16 experts, batch 4": f"{_MOE_SMALL} model.moe.num_experts=16 data.global_batch=4",
}


@dataclass
class Found:
    """One case: a process that takes its steps, seconds of these, and what was said."""

    config: Config
    process: BaseProcess
    pipe: Connection
    said: StepTime | None = None
    phases: list[tuple[float, float]] = field(default_factory=list)  # (forward and backward, update) of each step
    wall: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median step."""
        return float(np.median([sum(row) for row in self.phases]))

    def take(self) -> None:
        """Has the process take its steps, and notes those that count."""
        self.pipe.send(True)
        for micro, update, wall in self.pipe.recv():
            self.phases.append((micro, update))
            self.wall.append(wall)


def start(text: str, folder: str) -> Found:
    """Returns a case whose process makes its network now."""
    config = load_config("digits_swin_moe", f"model.moe.blocks=[] {text} run.output={folder}".split())
    context = get_context("fork")  # has torch already; nothing has run in this process yet
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(config, there), daemon=True)
    process.start()
    there.close()  # so that a process that is gone ends the pipe
    return Found(config, process, here)


def serve(config: Config, pipe: Connection) -> None:
    """Takes some steps each time it is asked to, and answers with (CPU seconds of forward and backward, of the update,
    seconds on the wall) of each but the first, which finds nothing in the caches."""
    step = SmallStep(config, torch.device("cpu"))
    while pipe.recv():
        pipe.send([_seconds(step) for _ in range(1 + COUNTED)][1:])


def _seconds(step: SmallStep) -> tuple[float, float, float]:
    wall, start = time.perf_counter(), time.process_time()
    step.micro_steps()
    middle = time.process_time()
    step.update()
    end = time.process_time()
    return middle - start, end - middle, time.perf_counter() - wall


def predict(config: Config, hardware: Hardware) -> StepTime:
    """Returns what the planner says of a step."""
    layout = layout_in(config, 1)
    return predict_time(config, hardware, build_workload(config), layout, micro_step_here(config, layout))


def _take_round(cases: dict[str, Found]) -> None:
    for found in cases.values():
        found.take()


class Between(Steps):
    """Takes rounds of the cases where calibration says that a network is done."""

    def __init__(self, cases: dict[str, Found], rounds: int) -> None:
        super().__init__(enabled=True)
        self.cases, self.every, self.done = cases, max(1, 2 * TURNS * len(NETWORKS) // rounds), 0

    def __call__(self, text: str) -> None:
        """Says what comes now."""
        super().__call__(text)
        if text.startswith("step of network"):
            self.done += 1
            if self.done % self.every == 0:
                _take_round(self.cases)
                super().__call__(f"round {self.done // self.every}")


def order(a: list[float], b: list[float]) -> float:
    """Returns Spearman's correlation of ranks."""
    places = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(places[0], places[1])[0, 1])


def table(cases: dict[str, Found]) -> list[str]:
    """Returns the comparison as lines of Markdown."""
    lines = [
        "| case | measured, ms | predicted, ms | error | forward and backward | update | on the wall, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    errors = []
    for name, found in cases.items():
        assert found.said is not None
        errors.append(found.said.seconds / found.seconds - 1)
        micro, update = (float(value) for value in np.median(found.phases, axis=0))
        parts = (found.said.forward + found.said.backward) / micro - 1, found.said.update / update - 1
        lines.append(
            f"| {name} | {1e3 * found.seconds:.0f} | {1e3 * found.said.seconds:.0f} | {100 * errors[-1]:+.1f} % | "
            f"{100 * parts[0]:+.1f} % | {100 * parts[1]:+.1f} % | {1e3 * float(np.median(found.wall)):.0f} |"
        )
    seen = [found.seconds for found in cases.values()]
    said = [found.said.seconds for found in cases.values() if found.said is not None]
    absolute = np.abs(errors)
    return [
        *lines,
        "",
        f"Largest error {100 * absolute.max():.1f} %, median {100 * np.median(absolute):.1f} %, within 15 %: "
        f"{int((absolute <= 0.15).sum())} of {len(errors)}; order of all, Spearman: {order(said, seen):.3f}.",
    ]


def main() -> None:
    """Prints the table, and writes it where --out says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    parser.add_argument("--hardware")
    parser.add_argument("--fresh", choices=("with", "without", "only"), default="without")
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, say = torch.device("cpu"), Steps(enabled=True)
    tables = {"with": CASES | FRESH, "without": CASES, "only": FRESH}
    words, table_of_cases = options.words, tables[options.fresh]
    chosen = {n: o for n, o in table_of_cases.items() if not words or any(word in n for word in words)}
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: start(text, folder) for name, text in chosen.items()}
        for name, found in cases.items():
            found.take()  # makes what is made once
            found.phases, found.wall = [], []
            say(f"first steps of {name}")
        if options.hardware:
            hardware = load_hardware(options.hardware)
            for number in range(options.rounds):
                _take_round(cases)
                say(f"round {number + 1} of {options.rounds}")
        else:
            between = Between(cases, options.rounds)
            hardware = measure_rank(device, load_hardware("cpu"), Path(folder), between, ranks=1)
    for name, found in cases.items():
        found.said = predict(found.config, hardware)
        say(f"predicted {name}")
    lines = table(cases)
    print("\n".join(lines))
    if options.out:
        Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

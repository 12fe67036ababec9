"""`swin-moe simulate`: one optimizer step on a world that is not there, event by event, with uneven experts."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from swin_moe.checkpoint.errors import describe
from swin_moe.config import Config
from swin_moe.config.arguments import print_answer
from swin_moe.config.io import load_config
from swin_moe.planner.hardware import Hardware, load_hardware
from swin_moe.planner.layouts import Layout
from swin_moe.planner.micro_step import micro_step_here, trace_micro_step
from swin_moe.planner.plan import Planned, make_plan
from swin_moe.planner.simulation.loads import draw_shares, shares_of_run
from swin_moe.planner.simulation.report import Simulated, lines, simulate
from swin_moe.planner.trace import Segment
from swin_moe.usage import parsers


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about what is wrong."""
    return print_answer(lambda: _answer(parsers.simulate(argv)), describe)


def _answer(options: Any) -> str:
    config, hardware = load_config(options.config, options.overrides), _machine(options)
    plan = make_plan(config, hardware, options.gpus)
    best, workload = plan.layouts[0], plan.workload
    experts, layers = config.model.moe.num_experts, len(workload.moe)
    shares = (
        shares_of_run(Path(options.routing), layers, experts, seed=options.seed)
        if options.routing and layers
        else draw_shares(layers, experts, spread=options.spread, seed=options.seed)
    )
    chosen = best.layout.apply(config)
    segments = _segments(chosen, best.layout, hardware)
    simulated = simulate(chosen, hardware, workload, best.layout, segments, shares)
    if options.json:
        return json.dumps(as_json(best, simulated, config, hardware, shares), indent=1)
    return "\n".join(_text(best, simulated, config, hardware, shares))


def _segments(config: Config, layout: Layout, hardware: Hardware) -> list[Segment]:
    if hardware.times_operators(config.engine.precision):
        return micro_step_here(config, layout)
    step = trace_micro_step(config, layout.degrees, images=_images(layout), kernels=hardware.device == "cuda")
    return step.at(layout.micro_batch)


def _machine(options: Any) -> Hardware:
    """Returns the machine with what the command line says of its network."""
    hardware = load_hardware(options.hardware)
    changed = {"oversubscription": options.oversubscription, "nodes_per_leaf": options.leaf}
    return replace(hardware, **{key: value for key, value in changed.items() if value is not None})


def _images(layout: Layout) -> int:
    return layout.micro_batch if layout.attention_chunk else 0


def _spread(shares: np.ndarray) -> float:
    return float(np.mean(shares.std(1) / shares.mean(1))) if shares.size else 0.0


def as_json(
    best: Planned, simulated: Simulated, config: Config, hardware: Hardware, shares: np.ndarray
) -> dict[str, Any]:
    """Returns the plan's best layout and its simulated step as JSON types."""
    return {
        "config": config.run.name,
        "hardware": hardware.name,
        "ranks": best.layout.world_size,
        "load_cv": _spread(shares),
        "planned": best.as_dict(),
        "simulated": simulated.as_dict(),
    }


def _text(best: Planned, simulated: Simulated, config: Config, hardware: Hardware, shares: np.ndarray) -> list[str]:
    options = " ".join(f"{key}={value}" for key, value in best.layout.options().items())
    return [
        f"{config.run.name} on {best.layout.world_size} x {hardware.name}, loads of experts spread by "
        f"{_spread(shares):.2f} of their mean",
        f"layout: {options}",
        f"planned step   {best.time.seconds:.4f} s, {best.images_per_second:,.0f} images/s (even loads, no contention)",
        *lines(simulated),
    ]

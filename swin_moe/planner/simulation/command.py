"""`swin-moe simulate`: one optimizer step on a world that is not there, event by event, with uneven experts."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from swin_moe.checkpoint.errors import describe
from swin_moe.config import Config
from swin_moe.config.arguments import Parser
from swin_moe.config.io import load_config
from swin_moe.planner.hardware import Hardware, load_hardware, shipped_hardware
from swin_moe.planner.layouts import Layout
from swin_moe.planner.micro_step import trace_micro_step
from swin_moe.planner.plan import MOST_GPUS, Planned, make_plan
from swin_moe.planner.simulation.loads import draw_shares, shares_of_run
from swin_moe.planner.simulation.report import Simulated, lines, simulate
from swin_moe.usage.texts import EXAMPLES


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about what is wrong."""
    try:
        options = parse(argv)
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
        step = trace_micro_step(
            chosen, best.layout.degrees, images=_images(best.layout), kernels=hardware.device == "cuda"
        )
        segments = step.at(best.layout.micro_batch)
        simulated = simulate(chosen, hardware, workload, best.layout, segments, shares)
    except BrokenPipeError:  # the command line ends in silence
        raise
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(best, simulated, config, hardware, shares), indent=1))
    else:
        print("\n".join(_text(best, simulated, config, hardware, shares)))
    return 0


def parse(argv: list[str] | None) -> Any:
    """Returns the options; raises ValueError for wrong ones."""
    parser = Parser(
        prog="swin-moe simulate",
        description=__doc__.partition("\n\n")[0],
        epilog=EXAMPLES["simulate"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any option of the config")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks, one per device")
    known = ", ".join(shipped_hardware())
    parser.add_argument("--hardware", required=True, metavar="NAME", help=f"{known}, or a YAML file")
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        metavar="CV",
        help="standard deviation over mean of the experts' loads (0 = even)",
    )
    parser.add_argument("--routing", metavar="RUN", help="folder of a run, or its metrics.jsonl, to draw loads from")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (0)")
    parser.add_argument("--oversubscription", type=float, metavar="X", help="in the place of the hardware file's")
    parser.add_argument("--leaf", type=int, metavar="NODES", help="nodes on a leaf switch, likewise")
    parser.add_argument("--json", action="store_true", help="layout, plan and simulation as JSON")
    options = parser.parse_intermixed_args(argv)
    for name, least in (("gpus", 1), ("leaf", 1), ("oversubscription", 1), ("spread", 0), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and not least <= value < np.inf:
            raise ValueError(f"swin-moe simulate: --{name} must be >= {least}, got {value}")
    if options.gpus > MOST_GPUS:
        raise ValueError(f"swin-moe simulate: --gpus must be at most {MOST_GPUS}, got {options.gpus}")
    if options.spread and options.routing:
        raise ValueError("swin-moe simulate: --spread and --routing both say how uneven experts are; give one")
    if options.routing and not Path(options.routing).exists():
        raise ValueError(f"swin-moe simulate: --routing {options.routing}: no such file or folder")
    return options


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

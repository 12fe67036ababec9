"""`swin-moe plan`: which layouts of a config N ranks can run, what each needs and how long a step takes."""

import json
import sys
from dataclasses import asdict
from typing import Any

from swin_moe.config import Config
from swin_moe.config.arguments import Parser
from swin_moe.config.io import load_config
from swin_moe.planner.hardware import Hardware, load_hardware, shipped_hardware
from swin_moe.planner.plan import Plan, Planned, make_plan

_SHOWN = 12  # layouts on the screen


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about what is wrong."""
    try:
        options = parse(argv)
        config, hardware = load_config(options.config, options.overrides), load_hardware(options.hardware)
        plan = make_plan(config, hardware, options.gpus)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(plan, config, hardware, options.gpus), indent=1))
    else:
        print("\n".join(lines(plan, config, hardware, options.gpus, shown=options.top)))
    return 0


def parse(argv: list[str] | None) -> Any:
    """Returns the options; raises ValueError for wrong ones."""
    parser = Parser(prog="swin-moe plan", description=__doc__.partition("\n\n")[0])
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any option of the config")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks, one per device")
    known = ", ".join(shipped_hardware())
    parser.add_argument("--hardware", required=True, metavar="NAME", help=f"{known}, or a YAML file")
    parser.add_argument("--json", action="store_true", help="all layouts and rejections as JSON")
    parser.add_argument("--top", type=int, default=_SHOWN, metavar="K", help=f"layouts in the table ({_SHOWN})")
    options = parser.parse_intermixed_args(argv)
    for name in ("gpus", "top"):
        if getattr(options, name) < 1:
            raise ValueError(f"swin-moe plan: --{name} must be >= 1, got {getattr(options, name)}")
    return options


def as_json(plan: Plan, config: Config, hardware: Hardware, ranks: int) -> dict[str, Any]:
    """Returns the plan as JSON types; the form is described in docs/planner.md."""
    return {
        "config": config.run.name,
        "hardware": hardware.name,
        "ranks": ranks,
        "global_batch": config.data.global_batch,
        "parameters": plan.workload.numel(),
        "flops": plan.workload.flops,
        "active_flops": plan.workload.active_flops,
        "layouts": [planned.as_dict() for planned in plan.layouts],
        "rejected": [asdict(rejected) for rejected in plan.rejected],
    }


def lines(plan: Plan, config: Config, hardware: Hardware, ranks: int, *, shown: int) -> list[str]:
    """Returns the table of the best layouts, and what was refused, in few words."""
    work = plan.workload
    text = [
        f"{config.run.name} on {ranks} x {hardware.name}: {work.numel() / 1e6:,.1f} M parameters, "
        f"{work.active_flops / 1e9:.2f} G multiply-accumulates an image, batch {config.data.global_batch}",
        "",
        f"{'engine':>11} {'expert':>9} {'recompute':>9} {'chunk':>5} {'micro':>9} {'overlap':>7} "
        f"{'images/s':>10} {'step s':>8} {'GiB':>6} {'MFU':>5}  bound by",
    ]
    text += [_row(planned) for planned in plan.layouts[:shown]]
    left = len(plan.layouts) - shown
    text += [f"... and {left} more (--top K, or --json)"] if left > 0 else []
    if plan.layouts:
        best = plan.layouts[0]
        text += ["", f"best: {' '.join(f'{key}={value}' for key, value in best.layout.options().items())}"]
        text += [_memory(best), _time(best)]
    reasons: dict[str, int] = {}
    for rejected in plan.rejected:
        reason = "too little memory" if rejected.reason.startswith("a rank would hold") else rejected.reason
        reasons[reason] = reasons.get(reason, 0) + 1
    text += ["", f"rejected ({len(plan.rejected)}):"] if reasons else []
    text += [f"  {count:5} x {reason}" for reason, count in reasons.items()]
    return text


def _row(planned: Planned) -> str:
    layout, time = planned.layout, planned.time
    expert = f"{layout.expert}x{layout.expert_shard}x{layout.expert_data}"
    micro = f"{layout.micro_batch}x{layout.accumulation}"
    overlap = f"{layout.overlap}{'h' if layout.transport == 'hierarchical' else ''}"
    return (
        f"{layout.engine:>9}-{layout.zero} {expert:>9} {layout.recompute:>9} {layout.attention_chunk:>5} {micro:>9} "
        f"{overlap:>7} {planned.images_per_second:>10,.0f} {time.seconds:>8.3f} {planned.memory.total / 2**30:>6.1f} "
        f"{100 * planned.model_flops_share:>4.0f}%  {time.bound_by}"
    )


def _memory(planned: Planned) -> str:
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in asdict(planned.memory).items() if size)
    return f"memory of the fullest rank, GiB: {parts}"


def _time(planned: Planned) -> str:
    time = planned.time
    parts = {name: getattr(time, name) for name in ("forward", "backward", "exchange", "reduction", "update")}
    words = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in parts.items())
    return f"step, ms: {words}; communication hidden beside it {1e3 * time.hidden:.1f}"

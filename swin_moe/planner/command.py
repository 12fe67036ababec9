"""`swin-moe plan`: which layouts of a config N ranks can run, what each needs and how long a step takes."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swin_moe.checkpoint.errors import describe, naming
from swin_moe.config import Config
from swin_moe.config.arguments import print_answer
from swin_moe.config.io import load_config
from swin_moe.planner.hardware import Hardware, dump_hardware
from swin_moe.planner.plan import Plan, Planned, make_plan
from swin_moe.planner.report.costs import describe_costs, predict_costs
from swin_moe.planner.report.plot import draw_plans, plans_by_world
from swin_moe.planner.report.skew import Skew, default_skew, recorded_skew, step_interval
from swin_moe.planner.runs.auto import hardware_of
from swin_moe.planner.runs.check import compare, refit, table, trace_run, without_loading
from swin_moe.planner.runs.records import read_run
from swin_moe.usage import parsers


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about what is wrong."""
    return print_answer(lambda: _answer(parsers.plan(argv)), describe)


def _answer(options: Any) -> str:
    return of_runs(options) if options.check or options.refit else of_config(options)


def of_config(options: Any) -> str:
    """Returns what the screen shows of a config's plan; draws the picture that is asked for."""
    config = load_config(options.config, options.overrides)
    hardware, _ = hardware_of(options.hardware or config.parallel.hardware)
    plan = make_plan(config, hardware, options.gpus)
    experts = config.model.moe.num_experts
    skew = default_skew(experts)
    if options.skew:
        skew = recorded_skew(read_run(options.skew, 1).loads, experts, options.skew)
    if options.plot:
        plans = plans_by_world(config, hardware, options.gpus, plan)
        title = f"{config.run.name} on {hardware.name}, batch {config.data.global_batch}: the best layouts"
        picture = draw_plans(plans, title, hardware.memory_bytes)
        with naming(Path(options.plot)):
            picture.save(options.plot, format="png")
    if options.json:
        return json.dumps(as_json(plan, config, hardware, options.gpus, skew, options.images), indent=1)
    text = lines(plan, config, hardware, options.gpus, shown=options.top)
    if plan.layouts:
        best = plan.layouts[0]
        low, high = step_interval(config, hardware, plan.workload, best, skew)
        more = [f"step with uneven routing: {low:.4g} to {high:.4g} s ({skew.source})"] if plan.workload.moe else []
        more += describe_costs(predict_costs(config, hardware, plan.workload, best, options.images))
        at = text.index(_time(best)) + 1
        text[at:at] = more
    return "\n".join(text)


def of_runs(options: Any) -> str:
    """Returns what the screen shows of runs: their predictions, or how well a fitted machine predicts them."""
    runs = [
        trace_run(read_run(name, options.gpus or 0)) for name in ([options.check] if options.check else options.refit)
    ]
    hardware, source = hardware_of(options.hardware or runs[0].run.config.parallel.hardware)
    if options.check:
        rows = compare(runs[0], hardware)
        if options.json:
            return json.dumps([asdict(row) | {"error": row.error} for row in rows], indent=1)
        return "\n".join(table(rows, f"{options.check}: {runs[0].run.ranks} x {hardware.name}"))
    fitted = refit(runs, hardware)
    names = ", ".join(options.refit)
    shares = {key: value for key, value in asdict(fitted).items() if key.endswith("_share")}
    with naming(Path(options.out)):
        dump_hardware(fitted, Path(options.out), f"{source}, with *_share fitted to the steps of {names}")
    text = [f"{key}: {getattr(hardware, key):.3g} -> {value:.3g}" for key, value in shares.items()]
    for traced in runs:
        errors = [traced.time(machine).seconds / without_loading(traced.run) - 1 for machine in (hardware, fitted)]
        text.append(f"step of {traced.run.directory}: error {errors[0]:+.1%} -> {errors[1]:+.1%}")
    return "\n".join([*text, f"written: {options.out}"])


def as_json(plan: Plan, config: Config, hardware: Hardware, ranks: int, skew: Skew, images: int) -> dict[str, Any]:
    """Returns the plan as JSON types; the form is described in docs/planner.md."""
    layouts = []
    for planned in plan.layouts:
        low, high = step_interval(config, hardware, plan.workload, planned, skew)
        costs = asdict(predict_costs(config, hardware, plan.workload, planned, images))
        interval = {"step_seconds_low": low, "step_seconds_high": high}
        layouts.append(planned.as_dict() | interval | {"costs": costs})
    return {
        "config": config.run.name,
        "hardware": hardware.name,
        "ranks": ranks,
        "global_batch": config.data.global_batch,
        "parameters": plan.workload.numel(),
        "flops": plan.workload.flops,
        "active_flops": plan.workload.active_flops,
        "skew": skew.source,
        "layouts": layouts,
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

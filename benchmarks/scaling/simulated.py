"""Worlds that no machine here can hold, simulated: the figures and the table of docs/scaling.md.

    python benchmarks/scaling/simulated.py OUT [--hardware a100_80] [--most 16384] [--draw-only]

SwinV2-MoE-B, -H and -G on 8 to 16,384 devices, as many images a device everywhere: one expert a device up to 2,048,
then replicas of 2,048; and on 2,048 devices, 32 to 2,048 experts, each on one device of its group. bf16, leaves of 16
nodes, 4 : 1 oversubscribed, loads of experts spread by 0.5 of their mean. Every point is `swin-moe simulate`: the plan
of the best layout, and its step event by event. A finished point is a file in OUT/points; the same command goes on.
Writes OUT/simulated.md and, for the page, OUT/simulated.png; published points are those of planner_published.py.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cells import main, say

from swin_moe.config.io import load_config
from swin_moe.planner.hardware import load_hardware
from swin_moe.planner.plan import Traces, make_plan
from swin_moe.planner.report.chart import PALETTE, Panel, Series, draw_panels
from swin_moe.planner.simulation.loads import draw_shares
from swin_moe.planner.simulation.report import simulate

SPREAD, LEAF, OVERSUBSCRIPTION = 0.5, 16, 4.0
MOST_EXPERTS = 2048
# name -> (config, images a device).
MODELS = {
    "B": ("swinv2_moe_base_patch4_window12_192_32expert_22k", 128),
    "H": ("swinv2_moe_huge_patch4_window12_192_32expert_22k", 32),
    "G": ("swinv2_moe_giant_3b_patch4_window12_192_64expert_22k", 8),
}
WORLDS = (8, 128, 2048, 16384)
AT = 2048  # devices on which the number of experts changes
EXPERTS = (32, 256, 2048)
# arXiv:2206.03382, Table 7: GPUs -> training images/s of SwinV2-MoE-B, one expert a GPU.
PUBLISHED = {8: 274, 16: 253, 32: 249, 64: 234, 128: 226}


@dataclass(frozen=True)
class Place:
    """One world of one network."""

    model: str
    ranks: int
    experts: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.model}-{self.ranks}-{self.experts}"


def places(most: int) -> list[Place]:
    """Returns all worlds, small ones first."""
    found = [Place(model, ranks, min(ranks, MOST_EXPERTS)) for ranks in WORLDS for model in MODELS if ranks <= most]
    found += [Place(model, AT, experts) for experts in EXPERTS for model in MODELS if most >= AT]
    return list(dict.fromkeys(found))


def find(place: Place, hardware_name: str) -> dict[str, Any]:
    """Returns what plan and simulation say of a world."""
    name, images = MODELS[place.model]
    words = [f"data.global_batch={images * place.ranks}", f"model.moe.num_experts={place.experts}"]
    config = load_config(name, [*words, "engine.precision=bf16", f"parallel.expert={place.experts}"])
    machine = replace(load_hardware(hardware_name), nodes_per_leaf=LEAF, oversubscription=OVERSUBSCRIPTION)
    traces = Traces(config, kernels=machine.device == "cuda")
    plan = make_plan(config, machine, place.ranks, traces)
    best, work = plan.layouts[0], plan.workload
    shares = draw_shares(len(work.moe), place.experts, spread=SPREAD, seed=0)
    segments = traces.of(best.layout)
    found = simulate(best.layout.apply(config), machine, work, best.layout, segments, shares)
    return {
        "parameters": work.numel(),
        "options": best.layout.options(),
        "memory_bytes": best.memory.total,
        "planned": best.images_per_second,
        "planned_seconds": best.time.seconds,
        "simulated": found.images_per_second,
        "seconds": found.seconds,
        "waiting": found.waiting,
        "exposed": found.exposed,
        "busiest": found.busiest,
    }


def draw(found: dict[Place, dict[str, Any]]) -> Any:
    """Returns the picture."""
    worlds: list[Series] = []
    shares: list[Series] = []
    experts: list[Series] = []
    for number, model in enumerate(MODELS):
        colour = PALETTE[number]
        scaled = [p for p in found if p.model == model and p.experts == min(p.ranks, MOST_EXPERTS)]
        each = {kind: [(p.ranks, found[p][kind] / p.ranks) for p in scaled] for kind in ("planned", "simulated")}
        worlds.append(Series(model, each["simulated"], colour=colour))
        worlds.append(Series("", each["planned"], colour=colour, dashed=True))
        shares.append(Series(model, [(p.ranks, 100 * found[p]["exposed"] / found[p]["seconds"]) for p in scaled],
                             colour=colour))  # fmt: skip
        chosen = sorted((p for p in found if p.model == model and p.ranks == AT), key=lambda p: p.experts)
        if chosen:
            experts.append(Series(model, [(p.experts, found[p]["simulated"] / p.ranks) for p in chosen], colour=colour))
    published = Series("published, B", [(n, float(rate)) for n, rate in PUBLISHED.items()], colour=PALETTE[-1])
    names = {float(n): f"{n:,}" for n in (*WORLDS, *EXPERTS, *PUBLISHED)}
    panels = [
        Panel("images/s a device, simulated (dashed: planned)", "devices, one expert each up to 2,048",
              [*worlds, published], names=names, log_y=True),
        Panel("communication that nothing hides, % of the step", "devices", shares, names=names, from_zero=True),
    ]  # fmt: skip
    if experts:
        panels.append(Panel(f"images/s a device on {AT:,} devices", "experts", experts, names=names, log_y=True))
    return draw_panels("SwinV2-MoE-B, -H, -G on A100 80 GB, leaves of 16 nodes 4 : 1, loads spread by 0.5", panels)


def table(found: dict[Place, dict[str, Any]]) -> list[str]:
    """Returns lines of Markdown."""
    lines = [
        "| model | devices | experts | parameters, G | layout | GiB | planned s | simulated s | images/s | exposed |",
        "|--|--|--|--|--|--|--|--|--|--|",
    ]
    order = list(MODELS)
    for p, row in sorted(found.items(), key=lambda pair: (order.index(pair[0].model), pair[0].ranks, pair[0].experts)):
        options = row["options"]
        layout = f"ZeRO-{options['parallel.zero']}, recompute {options['parallel.recompute']}"
        lines.append(
            f"| {p.model} | {p.ranks:,} | {p.experts:,} | {row['parameters'] / 1e9:.1f} | {layout} | "
            f"{row['memory_bytes'] / 2**30:.0f} | {row['planned_seconds']:.3f} | {row['seconds']:.3f} | "
            f"{row['simulated']:,.0f} | {100 * row['exposed'] / row['seconds']:.0f} % |"
        )
    return lines


def work() -> list[str]:
    """Finds all points, writes table and picture; returns sentences about worlds that nothing fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hardware", default="a100_80")
    parser.add_argument("--most", type=int, default=WORLDS[-1], help="devices")
    parser.add_argument("--draw-only", action="store_true")
    options = parser.parse_args()
    (options.out / "points").mkdir(parents=True, exist_ok=True)
    found: dict[Place, dict[str, Any]] = {}
    failures: list[str] = []
    for place in places(options.most):
        path = options.out / "points" / f"{place.name}.json"
        if not path.exists():
            if options.draw_only:
                continue
            try:
                result = find(place, options.hardware)
            except ValueError as error:
                failures.append(f"{place.name}: {error}")
                say(failures[-1])
                continue
            path.with_suffix(".tmp").write_text(json.dumps(result, indent=1), encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
        found[place] = json.loads(path.read_text(encoding="utf-8"))
        say(f"{place.name}: {found[place]['seconds']:.3f} s, {found[place]['simulated']:,.0f} images/s")
    if found:
        lines = table(found)
        (options.out / "simulated.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        draw(found).save(options.out / "simulated.png", optimize=True)
        say("\n".join(lines))
    return failures


if __name__ == "__main__":
    main(work)

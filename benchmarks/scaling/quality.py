"""Accuracy against experts and against active FLOPs: MoE beside its dense twin, over seeds.

    python benchmarks/scaling/quality.py OUT                                         # the digits
    python benchmarks/scaling/quality.py OUT --config CONFIG --data FOLDER           # an ImageFolder: train/ and val/
    python benchmarks/scaling/quality.py OUT [--experts 2,4,8] [--widths 24,48] [--seeds 3] [--ranks 1] [key=value ...]

Trains CONFIG, which has MoE blocks, once per width (model.embed_dim), number of experts and seed, and its dense twin,
the same without MoE blocks (model.moe.blocks=[]). Accuracy is that of the last evaluation, not of the best one, so that
the test images choose nothing. A finished run is a file in OUT/cells; the same command goes on where it stopped, also
inside a run. Seeds are the outer loop: what is there after one is a whole picture. Writes OUT/quality.md and
OUT/quality.png; bars are the lowest and highest seed.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cell, Study, add_arguments, check_numbers, main, numbers, say, study_of

from swin_moe.config.io import load_config
from swin_moe.planner.report.chart import PALETTE, Panel, Series, draw_panels
from swin_moe.planner.runs.records import read_evaluations
from swin_moe.planner.workload import build_workload

DENSE = 0  # experts of the dense twin


@dataclass(frozen=True)
class Point:
    """A network over its seeds. macs: Active multiply-accumulates of an image."""

    width: int
    experts: int
    macs: float
    parameters: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Mean accuracy, percent."""
        return statistics.mean(self.accuracies)


def accuracy(folder: str) -> dict[str, Any]:
    """Returns the last evaluation of a run."""
    last = read_evaluations(folder)[-1]
    return {key.replace("eval/", ""): value for key, value in last.items() if isinstance(value, int | float)}


def words_of(options: Any, width: int, experts: int) -> tuple[str, ...]:
    """Returns config and options of a network, without the seed."""
    data = (
        ("data.name=folder", f"data.path={Path(options.data).resolve()}", f"model.num_classes={classes(options.data)}")
        if options.data
        else ()
    )
    twin = ("model.moe.blocks=[]",) if experts == DENSE else (f"model.moe.num_experts={experts}",)
    return (options.config, *data, f"model.embed_dim={width}", *twin, *options.overrides)


def classes(folder: str) -> int:
    """Returns how many classes an ImageFolder has; raises ValueError where it has none."""
    train = Path(folder) / "train"
    found = sum(entry.is_dir() for entry in train.iterdir()) if train.is_dir() else 0
    if not found:
        raise ValueError(f"--data {folder}: no folder of images; it must hold train/CLASS/ and val/CLASS/")
    return found


def cells_of(options: Any) -> dict[tuple[int, int, int], Cell]:
    """Returns (width, experts, seed) -> cell, in the order in which they run."""
    found = {}
    for seed in range(options.seeds):
        for width in options.widths:
            for experts in (DENSE, *options.experts):
                name = f"w{width}-{f'e{experts}' if experts else 'dense'}-s{seed}"
                words = (*words_of(options, width, experts), f"run.seed={seed}")
                found[width, experts, seed] = Cell(name, options.ranks, words, goes_on=True)
    return found


def points_of(options: Any, study: Study, cells: dict[tuple[int, int, int], Cell]) -> list[Point]:
    """Returns networks of which at least one seed is finished."""
    found = []
    for width in options.widths:
        for experts in (DENSE, *options.experts):
            results = [study.result(cells[width, experts, seed]) for seed in range(options.seeds)]
            accuracies = [result["top1"] for result in results if result and "top1" in result]
            if accuracies:
                config, *words = words_of(options, width, experts)
                work = build_workload(load_config(config, words))
                found.append(Point(width, experts, work.active_flops, work.numel(), accuracies))
    return found


def draw(points: list[Point], title: str) -> Any:
    """Returns the picture: accuracy over experts for every width, and over active multiply-accumulates."""
    widths = sorted({point.width for point in points})
    counts = sorted({point.experts for point in points})
    beside = min((count for count in counts if count), default=2) / 2  # where the dense twin stands on a log axis
    names = {float(count or beside): str(count) if count else "dense" for count in counts}

    def series(name: str, chosen: list[Point], x: Any, **more: Any) -> Series:
        chosen = sorted(chosen, key=x)
        return Series(
            name, [(x(p), p.mean) for p in chosen], [(min(p.accuracies), max(p.accuracies)) for p in chosen], **more
        )

    by_width = [
        series(f"width {w}", [p for p in points if p.width == w], lambda p: p.experts or beside) for w in widths
    ]
    by_experts = [
        series(
            f"{n} experts" if n else "dense",
            [p for p in points if p.experts == n],
            lambda p: p.macs / 1e6,
            dashed=n == DENSE,
            colour=PALETTE[-1] if n == DENSE else None,
        )
        for n in counts
    ]
    return draw_panels(
        title,
        [
            Panel("accuracy, % (bars: lowest and highest seed)", "experts", by_width, names=names),
            Panel("accuracy, %", "active multiply-accumulates of an image, millions", by_experts),
        ],
    )


def table(points: list[Point]) -> list[str]:
    """Returns lines of Markdown, each network beside its dense twin."""
    lines = [
        "| width | experts | parameters, M | active MMACs | seeds | accuracy, % | lowest to highest | against dense |",
        "|--|--|--|--|--|--|--|--|",
    ]
    dense = {point.width: point.mean for point in points if point.experts == DENSE}
    for p in points:
        against = f"{p.mean - dense[p.width]:+.2f}" if p.experts and p.width in dense else ""
        spread = f" ± {statistics.stdev(p.accuracies):.2f}" if len(p.accuracies) > 1 else ""
        lines.append(
            f"| {p.width} | {p.experts or 'dense'} | {p.parameters / 1e6:.2f} | {p.macs / 1e6:.1f} | "
            f"{len(p.accuracies)} | {p.mean:.2f}{spread} | {min(p.accuracies):.2f} to {max(p.accuracies):.2f} | "
            f"{against} |"
        )
    return lines


def parse(argv: list[str] | None = None) -> Any:
    """Returns the options; raises ValueError for wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="folder of the study")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of all runs")
    parser.add_argument("--config", default="digits_swin_moe", help="a config with MoE blocks (digits_swin_moe)")
    parser.add_argument("--data", default="", metavar="FOLDER", help="an ImageFolder with train/ and val/")
    parser.add_argument("--experts", default="2,4,8", help="numbers of experts (2,4,8)")
    parser.add_argument("--widths", default="", help="model.embed_dim; default: half and all of the config's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="of a run (1)")
    add_arguments(parser)
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.config, options.overrides)
    if not config.model.moe.has_blocks:
        raise ValueError(f"--config {options.config} has no MoE blocks; choose one that has, such as digits_swin_moe")
    width = config.model.embed_dim
    options.experts = numbers(options.experts)
    options.widths = numbers(options.widths) if options.widths else (width // 2, width)
    check_numbers(options, seeds=1, ranks=1)
    for width in options.widths:
        for experts in (DENSE, *options.experts):
            chosen, *words = words_of(options, width, experts)
            load_config(chosen, words).check(options.ranks)
    return options


def work() -> list[str]:
    """Runs the study and writes its table and picture; returns failures."""
    options = parse()
    study = study_of(options, accuracy)
    cells = cells_of(options)
    failures = [] if options.draw_only else study.run(list(cells.values()))
    points = points_of(options, study, cells)
    if not points:
        say("no cell is finished: nothing to draw")
        return failures
    lines = table(points)
    (study.folder / "quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = Path(options.data).name if options.data else options.config
    seeds = sorted({len(point.accuracies) for point in points})
    how_many = " or ".join(map(str, seeds))
    draw(points, f"{source}: MoE beside its dense twin, seeds: {how_many}").save(study.folder / "quality.png")
    say("\n".join([*lines, f"drawn: {study.folder / 'quality.png'}"]))
    return failures


if __name__ == "__main__":
    main(work)

"""Training speed over ranks, experts and model size, on whatever is there: CPU ranks, or GPUs.

    python benchmarks/scaling/sweep.py OUT [weak] [strong] [experts] [models] [--ranks 1,2,4] [--experts 1,2,4,8,64]
        [--config CONFIG] [--batch 16] [--steps 12] [--repeats 3] [--launch '--hostfile hosts'] [key=value ...]

weak: --batch images a rank. strong: as many images in all as the most ranks get there. experts: every number of them,
and none (the dense twin), on every number of ranks, --batch images a rank. models: the shipped networks by size,
--model-batch images a rank, on the most ranks, until one needs more memory than there is (by the plan, or by trial), or
--largest. All four without a word. Images are synthetic; a cell is a run of --steps steps, and its speed the median of
its records but the first.

A finished cell is a file in OUT/cells: the same command goes on where it stopped. Repeats are the outer loop, so that a
disturbance meets all cells alike. Writes OUT/scaling.md and OUT/scaling.png; bars are the slowest and fastest repeat.
"""

import argparse
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Study, add_arguments, check_numbers, main, numbers, say, study_of

from swin_moe.config import Config
from swin_moe.config.io import load_config
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.memory import predict_memory
from swin_moe.planner.plan import Traces
from swin_moe.planner.report.chart import Panel, Series, draw_panels
from swin_moe.planner.runs.records import read_run
from swin_moe.planner.workload import build_workload

KINDS = ("weak", "strong", "experts", "models")
DENSE = 0  # experts of the dense twin
# By parameters: 0.05 M to 3 B.
MODELS = (
    "synthetic_swin_moe",
    "digits_swin_moe",
    "swinv2_tiny_patch4_window8_256",
    "swinv2_small_patch4_window8_256",
    "swinv2_base_patch4_window12_192_22k",
    "swinv2_large_patch4_window12_192_22k",
    "swinv2_huge_patch4_window12_192",
    "swinv2_giant_1b_patch4_window12_192",
    "swinv2_giant_3b_patch4_window12_192_22k",
)
PROCESS_BYTES = 600e6  # of a rank on the CPU before its network: Python, torch, buffers of gloo


@dataclass(frozen=True)
class Wanted:
    """A cell and its place in the figures. x: Ranks, experts or millions of parameters."""

    kind: str
    ranks: int
    x: float
    repeat: int
    cell: Cell


@dataclass(frozen=True)
class Speed:
    """Images per second of a place over its repeats."""

    kind: str
    ranks: int
    x: float
    rates: list[float]
    peak_bytes: float  # of the fullest repeat; a process on the CPU, tensors on a device

    @property
    def rate(self) -> float:
        """The median repeat."""
        return statistics.median(self.rates)


def speed(folder: str) -> dict[str, Any]:
    """Returns what a run's records say of its speed."""
    run = read_run(folder)
    keys = ("speed/images_per_second", "memory/peak_bytes", "speed/s_forward", "speed/s_backward", "speed/s_update")
    return {key.partition("/")[2]: run.median(key) for key in keys if run.median(key) is not None}


def words_of(options: Any, config: str, batch: int, *more: str) -> tuple[str, ...]:
    """Returns config and options of a run of a few steps without evaluation."""
    epochs = ("optim.epochs=1", "optim.warmup_epochs=0", "optim.schedule=cosine", "optim.milestones=[]")
    data = ("data.name=synthetic", f"data.synthetic_samples={batch * options.steps}", f"data.global_batch={batch}")
    log = (f"log.every={max(1, options.steps // 4)}", "log.eval_every=0", "checkpoint.every_epochs=1000")
    return (config, *data, *epochs, *log, *more, *options.overrides)


def cells_of(options: Any) -> list[Wanted]:
    """Returns all cells, in the order in which they run."""
    found, most = [], max(options.ranks)
    models = {}
    for name in options.models if "models" in options.kinds else ():
        # A rank's images, few as they are, are a routing group.
        words = words_of(options, name, options.model_batch * most, "model.moe.capacity_scope=rank")
        models[words] = build_workload(load_config(words[0], list(words[1:]))).numel() / 1e6
    for repeat in range(options.repeats):

        def add(kind: str, ranks: int, x: float, words: tuple[str, ...], repeat: int = repeat) -> None:
            name = f"{kind}-r{ranks}-{x:g}-{repeat}"
            found.append(Wanted(kind, ranks, x, repeat, Cell(name, ranks, words)))

        for ranks in options.ranks:
            if "weak" in options.kinds:
                add("weak", ranks, ranks, words_of(options, options.config, options.batch * ranks))
            if "strong" in options.kinds:
                add("strong", ranks, ranks, words_of(options, options.config, options.batch * most))
            for experts in (DENSE, *options.experts) if "experts" in options.kinds else ():
                twin = "model.moe.blocks=[]" if experts == DENSE else f"model.moe.num_experts={experts}"
                add("experts", ranks, experts, words_of(options, options.config, options.batch * ranks, twin))
        for words, millions in models.items():
            add("models", most, millions, words)
    return found


def room() -> float:
    """Returns bytes of memory for one rank's tensors: of a device, or of all ranks on the CPU together."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo does not say MemAvailable: how large a network fits is not known")


def lack_of_memory(config: Config, ranks: int) -> str:
    """Returns why a run would not fit here, by the planner; nothing where it does."""
    layout = layout_in(config, ranks)
    memory = predict_memory(config, build_workload(config), layout, Traces(config).of(layout)).total
    needed = memory if torch.cuda.is_available() else ranks * (memory + PROCESS_BYTES)
    there = room()
    return f"needs {needed / 2**30:.1f} GiB, there are {there / 2**30:.1f}" if needed > there else ""


def run(study: Study, wanted: list[Wanted]) -> list[str]:
    """Runs cells; models one by one, each after a look at memory, up to the first that does not fit."""
    failures = study.run([w.cell for w in wanted if w.kind != "models"])
    models = [w for w in wanted if w.kind == "models"]
    for repeat in sorted({w.repeat for w in models}):
        for w in (w for w in models if w.repeat == repeat):
            result = study.result(w.cell)
            if result is None:
                config, *words = w.cell.words
                why = lack_of_memory(load_config(config, words), w.ranks)
                if why:
                    study.write_unfit(w.cell, why)
                    say(f"{w.cell.name}: {config} {why}")
                else:
                    failures += study.run([w.cell])
                result = study.result(w.cell)
            if result is not None and not result.get("fits", True):
                break
    return failures


def speeds_of(study: Study, wanted: list[Wanted]) -> list[Speed]:
    """Returns what is finished, repeats together, in the order of the cells."""
    found: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for w in wanted:
        result = study.result(w.cell)
        if result is not None and result.get("fits", True):
            found.setdefault((w.kind, w.ranks, w.x), []).append(result)
    return [
        Speed(*key, [r["images_per_second"] for r in results], max(r.get("peak_bytes", 0.0) for r in results))
        for key, results in found.items()
    ]


def draw(speeds: list[Speed], title: str) -> Any:
    """Returns the picture: a panel for every kind that is there."""
    panels = []
    ranks = sorted({s.ranks for s in speeds})
    for kind in ("weak", "strong"):
        chosen = [s for s in speeds if s.kind == kind]
        if chosen:
            first = chosen[0]
            ideal = [(s.x, first.rate * s.x / first.x) for s in chosen]
            curves = [_series("measured", chosen, texts=True), Series("as many times the first", ideal, dashed=True)]
            what = "the same images a rank" if kind == "weak" else "the same images in all"
            panels.append(Panel(f"{kind} scaling, images per second ({what})", "ranks", curves, log_y=True))
    experts = [s for s in speeds if s.kind == "experts"]
    if experts:
        beside = min((s.x for s in experts if s.x), default=1.0) / 2  # where the dense twin stands on a log axis
        names = {s.x or beside: f"{s.x:g}" if s.x else "dense" for s in experts}
        curves = [
            _series(f"{n} ranks" if n > 1 else "1 rank", [s for s in experts if s.ranks == n], zero=beside)
            for n in ranks
            if any(s.ranks == n for s in experts)
        ]
        panels.append(Panel("images per second over experts", "experts", curves, names=names, from_zero=True))
    models = [s for s in speeds if s.kind == "models"]
    if models:
        curves = [_series(f"{models[0].ranks} ranks", models, texts=True)]
        panels.append(Panel("images per second over size", "parameters, millions", curves, log_y=True))
    return draw_panels(title, panels)


def _series(name: str, speeds: list[Speed], zero: float = 0.0, *, texts: bool = False) -> Series:
    """Returns a curve. zero: Where 0 stands."""
    ranges = [(min(s.rates), max(s.rates)) for s in speeds]
    return Series(name, [(s.x or zero, s.rate) for s in speeds], ranges, texts=texts)


def table(speeds: list[Speed]) -> list[str]:
    """Returns lines of Markdown. Efficiency: of a rank, against the fewest ranks with the same x or kind."""
    lines = [
        "| sweep | ranks | x | images/s | slowest to fastest repeat | a rank's share of the first | peak, GiB |",
        "|--|--|--|--|--|--|--|",
    ]
    first: dict[tuple[str, float], float] = {}
    for s in speeds:
        key = (s.kind, s.x if s.kind == "experts" else 0.0)
        each = s.rate / s.ranks
        share = "" if s.kind == "models" else f"{100 * each / first.setdefault(key, each):.0f} %"
        x = f"{s.x:g} M" if s.kind == "models" else (f"{s.x:g}" if s.x else "dense")
        lines.append(
            f"| {s.kind} | {s.ranks} | {x} | {s.rate:.4g} | {min(s.rates):.4g} to {max(s.rates):.4g} | {share} | "
            f"{s.peak_bytes / 2**30:.2f} |"
        )
    return lines


def parse(argv: list[str] | None = None) -> Any:
    """Returns the options; raises ValueError for wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", metavar="OUT", help="folder of the sweep")
    add("words", nargs="*", metavar="KIND|key=value", help=f"{', '.join(KINDS)} (all); options of all runs")
    add(
        "--config",
        default="",
        help="of all but models (synthetic_swin_moe on CPUs, Swin-MoE-S with 32 experts on GPUs)",
    )
    add("--ranks", default="", help="default: powers of two up to the devices, or cores, of this host")
    add("--experts", default="1,2,4,8,16,32,64")
    add("--batch", type=int, default=16, help="images a rank, of all but models (16)")
    add("--model-batch", type=int, default=4, help="images a rank of models (4)")
    add("--largest", default=MODELS[-1], choices=MODELS, metavar="CONFIG", help="where models end (the largest)")
    add("--steps", type=int, default=12, help="of a cell (12)")
    add("--repeats", type=int, default=3)
    add_arguments(parser)
    options = parser.parse_intermixed_args(argv)
    options.overrides = [word for word in options.words if "=" in word]
    options.kinds = [word for word in options.words if "=" not in word] or list(KINDS)
    for kind in options.kinds:
        if kind not in KINDS:
            raise ValueError(f"no sweep {kind!r}; there are {', '.join(KINDS)}")
    gpus = torch.cuda.device_count()
    options.config = options.config or (
        "swin_moe_small_patch4_window12_192_32expert_32gpu_22k" if gpus else "synthetic_swin_moe"
    )
    devices = gpus or os.cpu_count() or 1
    powers = [2**n for n in range(devices.bit_length())]
    options.ranks = tuple(sorted(set(numbers(options.ranks)))) if options.ranks else tuple(powers)
    options.experts = numbers(options.experts)
    options.models = MODELS[: MODELS.index(options.largest) + 1]
    check_numbers(options, batch=1, model_batch=1, steps=4, repeats=1)
    for wanted in cells_of(options):
        config, *words = wanted.cell.words
        load_config(config, words).check(wanted.ranks)
    return options


def work() -> list[str]:
    """Runs the sweeps and writes their table and picture; returns failures."""
    options = parse()
    study = study_of(options, speed)
    wanted = cells_of(options)
    failures = [] if options.draw_only else run(study, wanted)
    speeds = speeds_of(study, wanted)
    if not speeds:
        say("no cell is finished: nothing to draw")
        return failures
    lines = table(speeds)
    (study.folder / "scaling.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a host of {os.cpu_count()} cores"
    draw(speeds, f"{options.config} on {device}").save(study.folder / "scaling.png")
    say("\n".join([*lines, f"drawn: {study.folder / 'scaling.png'}"]))
    return failures


if __name__ == "__main__":
    main(work)

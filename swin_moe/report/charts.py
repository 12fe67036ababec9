"""Which records of runs stand in which picture: CHARTS, and a chart for whatever a run records beyond them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from swin_moe.report.draw import Curve, draw_curves, draw_heat
from swin_moe.report.records import Run

_MOST_COLUMNS = 240  # of a heat map; more records are averaged
_LOAD = "/load"  # ends the key of a layer's tokens per expert
_PHASES = ("forward", "backward", "forward_backward", "update", "loading")  # run/step_records.py


@dataclass(frozen=True)
class Chart:
    """A row of CHARTS."""

    title: str
    keys: tuple[str, ...]  # of records; those a run has
    unit: str = ""
    scale: float = 1.0  # of values
    logarithmic: bool = False


CHARTS = (
    Chart("Loss", ("train/loss", "eval/loss")),
    Chart("Accuracy on validation images", ("eval/top1", "eval/top5"), "%"),
    Chart("Learning rate", ("train/lr",)),
    Chart("Norm of the gradient", ("train/grad_norm",), logarithmic=True),
    Chart("Throughput", ("speed/images_per_second",), "images/s"),
    Chart("Share of the machine's peak arithmetic", ("speed/mfu_percent",), "%"),
    Chart("Seconds of a step, by phase", tuple(f"speed/s_{name}" for name in _PHASES), "s"),
    Chart(
        "Memory of a rank", ("memory/peak_bytes", "memory/parameters_bytes", "memory/optimizer_bytes"), "GiB", 2.0**-30
    ),
    Chart("Auxiliary loss", ("train/aux",)),
)
# What stands in a chart of all MoE layers: end of the key -> title, unit.
LAYERS = {
    "dropped_percent": ("Tokens that found no room at their expert", "%"),
    "load_cv": ("Unevenness of experts (standard deviation of tokens over their mean)", ""),
    "entropy": ("Entropy of the router's choice", "nats"),
    "dead_experts": ("Experts without a token", ""),
}
_QUIET = ("train/epoch", "speed/ranks", "eval/samples", "train/loss_scale", "train/clip_factor")  # drawn if they vary


@dataclass(frozen=True)
class Figure:
    """A picture with what it shows in words."""

    name: str  # of a file, without .png
    title: str
    picture: Image.Image
    words: str  # last values, for those who do not see it


def curve_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Yields the charts of CHARTS, then one of every other quantity that a run records, MoE layers apart."""
    seen = {key for chart in CHARTS for key in chart.keys}
    others = sorted({key for run in runs for key, series in run.series.items() if series.values.ndim == 1} - seen)
    quiet = [key for key in others if key in _QUIET and not any(_varies(run, key) for run in runs)]
    more = [Chart(key, (key,)) for key in others if key not in quiet and not key.startswith("moe/")]
    for chart in (*CHARTS, *more):
        lines = list(_lines(chart, runs))
        if lines:
            title = f"{chart.title}, {chart.unit}" if chart.unit else chart.title
            picture = draw_curves(lines, logarithmic=chart.logarithmic)
            yield Figure(_file(chart.keys[0]), title, picture, _last(lines, chart.unit))


def layer_figures(run: Run) -> Iterator[Figure]:
    """Yields what the MoE layers of a run recorded: a chart per quantity, and a heat map of every layer's experts."""
    layers = layers_of(run)
    for end, (title, unit) in LAYERS.items():
        lines = []
        for number, layer in enumerate(layers):
            series = run.series.get(f"moe/{layer}/{end}")
            if series is not None:
                lines.append(Curve(layer, series.steps, series.values, number, dashed=number // 8 % 2 == 1))
        if lines:
            title = f"{title}, {unit}" if unit else title
            yield Figure(_file(f"{run.name}-{end}"), title, draw_curves(lines), _last(lines, unit))
    for layer in layers:
        series = run.series.get(f"moe/{layer}{_LOAD}")
        if series is not None and series.values.ndim == 2:
            yield _heat(run, layer, series.steps, series.values)


def layers_of(run: Run) -> list[str]:
    """Returns the names of the MoE layers that a run recorded, in the order of the network."""
    names = {key.removeprefix("moe/").rpartition("/")[0] for key in run.series if key.startswith("moe/")}
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])


def _heat(run: Run, layer: str, steps: np.ndarray, loads: np.ndarray) -> Figure:
    """Returns the map of an expert's tokens over those of an even share, over the steps."""
    total = loads.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, loads * loads.shape[1] / np.maximum(total, 1), np.nan)
    if len(shares) > _MOST_COLUMNS:
        shares = np.stack([part.mean(axis=0) for part in np.array_split(shares, _MOST_COLUMNS)])
    picture = draw_heat(
        shares.T,
        rows="expert",
        columns="step",
        high=max(2.0, float(np.nanmax(shares))),
        ends=(float(steps[0]), float(steps[-1])),
        unit="of an even share",
    )
    least, most = np.nanmin(shares[-1]), np.nanmax(shares[-1])
    words = f"at the end from {least:.2f} (expert {np.nanargmin(shares[-1])}) to {most:.2f} of an even share"
    return Figure(_file(f"{run.name}-{layer}-load"), f"Tokens of each expert of {layer}", picture, words)


def _lines(chart: Chart, runs: Sequence[Run]) -> Iterator[Curve]:
    """Yields a curve per run and key: runs differ by colour, keys by dashes; of one run, keys by colour."""
    keys = [key for key in chart.keys if any(key in run.series for run in runs)]
    for r, run in enumerate(runs):
        for k, key in enumerate(keys):
            series = run.series.get(key)
            if series is None or series.values.ndim != 1:
                continue
            names = [*([run.name] if len(runs) > 1 else []), *([key] if len(keys) > 1 else [])]
            colour, dashed = (r, k > 0) if len(runs) > 1 else (k, False)
            yield Curve(" ".join(names) or key, series.steps, series.values * chart.scale, colour, dashed)


def _last(lines: Sequence[Curve], unit: str) -> str:
    texts = [f"{line.label} {line.y[-1]:.4g}{' ' * bool(unit)}{unit}" for line in lines[:8]]
    return f"last: {', '.join(texts)}{', ...' if len(lines) > 8 else ''}"


def _varies(run: Run, key: str) -> bool:
    series = run.series.get(key)
    return series is not None and series.values.ndim == 1 and key != "train/epoch" and np.ptp(series.values) > 0


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)

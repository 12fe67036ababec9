"""The page: one HTML file that needs no network, and the same pictures as files."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from swin_moe.checkpoint.errors import naming
from swin_moe.config.yaml_files import write_whole
from swin_moe.data.transforms import to_rgb
from swin_moe.report.charts import Figure, curve_figures, layer_figures
from swin_moe.report.draw import draw_counts, draw_images
from swin_moe.report.records import Run
from swin_moe.report.results import Results, Seen
from swin_moe.run.routing_pictures import draw_patches

_MOST_CLASSES = 60  # rows of the table of classes
_MOST_CONFUSED = 20
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1e1e1e;margin:0 auto;max-width:1180px;padding:0 16px 48px;
overflow-wrap:break-word}
h1{font-size:1.6rem;margin:1.2rem 0 .2rem}h2{font-size:1.25rem;margin:2rem 0 .6rem;border-bottom:1px solid #ddd}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr));gap:20px}
figure{margin:0}figure img{width:100%;height:auto;max-width:560px}figure.wide img{max-width:100%;width:auto}
figcaption{font-size:.95rem}figcaption small{display:block;color:#5f5f5f}
table{border-collapse:collapse;font-size:.92rem}td,th{padding:2px 12px 2px 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}.bar{background:#0072b2;height:.8em;display:inline-block}
@media(max-width:700px){figure.wide{overflow-x:auto}figure.wide img{max-width:none}}
.scroll{overflow-x:auto}details{margin:.6rem 0}code{background:#f4f4f4;padding:0 3px}p.note{color:#5f5f5f}
"""


def build(
    runs: Sequence[Run], results: Sequence[Results | None], notes: Sequence[str] = ()
) -> tuple[str, list[Figure]]:
    """Returns (the page, its pictures).

    Args:
        results: Of each run, None where they could not be had.
        notes: Sentences about what is not there, and why.
    """
    figures: list[Figure] = []
    parts = [_head(runs), *(f'<p class="note">{escape(note)}</p>' for note in notes)]
    parts += _section("Training", list(curve_figures(runs)), figures)
    for run, found in zip(runs, results):
        of = f" of {run.name}" if len(runs) > 1 else ""
        parts += _section(f"Experts{of}", list(layer_figures(run)), figures)
        if found is not None:
            parts += _results(found, run.name, of, figures)
    parts += _configuration(runs)
    title = ", ".join(run.name for run in runs)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
    return page, figures


def write(page: str, figures: Iterable[Figure], target: Path, pictures: bool) -> None:
    """Writes the page, and with `pictures` each as a PNG into the folder that is called like it.

    Raises:
        OSError: It cannot be written; names the file.
    """
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, page)
    if pictures:
        folder = target.with_suffix("")
        with naming(folder):
            folder.mkdir(exist_ok=True)
            for figure in figures:
                figure.picture.save(folder / f"{figure.name}.png")


def _head(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        told = [f"{run.last_step} steps"]
        for key in ("eval/top1", "eval/loss"):
            if (best := _best(run, key)) is not None:
                told.append(f"best {key} {best:.4g}")
        told += [f"{key} {value}" for key, value in run.about.items() if value]
        rows.append(f"<tr><th>{escape(run.name)}</th><td>{escape(', '.join(told))}</td></tr>")
    return f"<h1>{escape(', '.join(run.name for run in runs))}</h1><table>{''.join(rows)}</table>"


def _best(run: Run, key: str) -> float | None:
    series = run.series.get(key)
    if series is None:
        return None
    return float(series.values.min() if key.endswith("loss") else series.values.max())


def _section(title: str, found: list[Figure], figures: list[Figure], *, wide: bool = False) -> list[str]:
    """Returns a section of pictures, none where there are none; adds them to `figures`."""
    figures += found
    if not found:
        return []
    shown = "".join(_figure(figure, wide) for figure in found)
    return [f'<h2>{escape(title)}</h2><div class="{"scroll" if wide else "grid"}">{shown}</div>']


def _figure(figure: Figure, wide: bool) -> str:
    file = io.BytesIO()
    figure.picture.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    words, kind = escape(figure.words), ' class="wide"' if wide else ""
    title = escape(figure.title)
    return (
        f"<figure{kind}><figcaption>{title}<small>{words}</small></figcaption>"
        f'<img alt="{title}; {words}" width="{figure.picture.width // 2}" src="data:image/png;base64,{data}"></figure>'
    )


def _results(found: Results, name: str, of: str, figures: list[Figure]) -> list[str]:
    """Returns what was found on validation images."""
    right = int(np.trace(found.counts))
    words = f"{right} of {found.images} images right ({right / max(1, found.images):.2%})"
    if found.images < found.total:
        words += f"; {found.images} of {found.total} were looked at (--images)"
    table = draw_counts(found.counts, found.classes, down="what an image is", across="what it was called")
    sets = [
        Figure(f"{name}-confusions", "Confusions", table, words),
        *(
            _gallery(f"{name}-{key}", title, seen, found.classes)
            for key, title, seen in (
                ("worst", "Least probability of what they are", found.worst),
                ("best", "Right and most certain", found.best),
            )
            if seen
        ),
    ]
    parts = _section(f"Validation images{of}", sets, figures, wide=True)
    parts.append(f'<p class="note">{escape(found.weights)}</p>')
    parts += [_class_table(found), _confusion_table(found)]
    routed = []
    for number, (seen, maps) in enumerate(found.routed):
        picture = draw_patches(to_rgb(seen.image), maps, found.num_experts, numbered=True)
        title = f"Which expert took which patch of an image of {found.classes[seen.label]}"
        routed.append(Figure(f"{name}-routing-{number}", title, picture, f"{len(maps)} MoE layers, first choices"))
    return parts + _section(f"Routing{of}", routed, figures, wide=True)


def _gallery(name: str, title: str, seen: Sequence[Seen], classes: Sequence[str]) -> Figure:
    captions = []
    for one in seen:
        called = "right" if one.said == one.label else f"called {classes[one.said]}"
        captions.append((classes[one.label], f"{one.probability:.1%}, {called}"))
    words = "; ".join(", ".join(lines) for lines in captions)
    return Figure(name, title, draw_images([to_rgb(one.image) for one in seen], captions), words)


def _class_table(found: Results) -> str:
    accuracy, sums = found.accuracy, found.counts.sum(axis=1)
    order = [int(k) for k in np.argsort(accuracy, kind="stable") if sums[k]]
    rows = "".join(
        f'<tr><td>{escape(found.classes[k])}</td><td class="n">{accuracy[k]:.1f} %</td>'
        f'<td class="n">{sums[k]}</td><td><span class="bar" '
        f'style="width:min({accuracy[k] * 2:.0f}px,{accuracy[k] * 0.4:.1f}vw)"></span></td></tr>'
        for k in order[:_MOST_CLASSES]
    )
    left = f", the {_MOST_CLASSES} worst of {len(order)}" if len(order) > _MOST_CLASSES else ""
    head = "<tr><th>class</th><th>right</th><th>images</th><th></th></tr>"
    return f"<details open><summary>Accuracy by class{left}</summary><table>{head}{rows}</table></details>"


def _confusion_table(found: Results) -> str:
    rows = "".join(
        f'<tr><td>{escape(found.classes[k])}</td><td>{escape(found.classes[j])}</td><td class="n">{count}</td></tr>'
        for count, k, j in found.confused(_MOST_CONFUSED)
    )
    if not rows:
        return ""
    head = "<tr><th>is</th><th>was called</th><th>images</th></tr>"
    return f"<details><summary>Most frequent confusions</summary><table>{head}{rows}</table></details>"


def _configuration(runs: Sequence[Run]) -> list[str]:
    """Returns the options: of one run all, of several first those that differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differ = [key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1]
    parts = ["<h2>Configuration</h2>"]
    if len(runs) > 1:
        parts.append(f"<p>What differs:</p>{_options(runs, differ)}" if differ else "<p>The same in all runs.</p>")
    return [*parts, f"<details><summary>All options</summary>{_options(runs, keys)}</details>"]


def _options(runs: Sequence[Run], keys: Sequence[str]) -> str:
    names = "".join(f"<th>{escape(run.name)}</th>" for run in runs) if len(runs) > 1 else ""
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(f"<td>{escape(str(run.config.get(key, '')))}</td>" for run in runs)
        + "</tr>"
        for key in keys
    )
    head = f"<tr><th></th>{names}</tr>" if names else ""
    return f'<div class="scroll"><table>{head}{rows}</table></div>'

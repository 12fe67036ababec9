"""What is said of a folder of images: counts, sizes, and everything that spoils training or its figures.

Shape legend: N images of all splits, K classes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_moe.curate.duplicates import find_duplicates
from swin_moe.curate.examine import Examined, examine, joined
from swin_moe.curate.find import Found

_UNEVEN = 10  # the largest class over the smallest one that is worth a word
_FEW_IN_TRAIN, _FEW_IN_VAL = 10, 5  # images of a class
_ODD_SHAPE = 3.0  # longer side over shorter: the crop of evaluation drops most of such an image
_SHOWN = 5  # of each kind of finding, in text
_MOST_ROWS = 30  # classes in the table; of more, the smallest and largest


@dataclass(frozen=True)
class Finding:
    """One kind of thing that is wrong, or worth knowing."""

    kind: str
    sentence: str
    cases: list[list[str]]  # files, or names of classes, each with what belongs to it
    severe: bool  # spoils training or its figures


@dataclass(frozen=True)
class Report:
    """What `data check` says."""

    found: Found
    counts: dict[str, np.ndarray]  # split -> (K,) images of each class
    size_N2: np.ndarray  # (width, height) of all that can be decoded
    findings: list[Finding]
    broken: dict[str, set[int]]  # split -> numbers of images

    @property
    def is_clean(self) -> bool:
        """Whether nothing severe was found."""
        return not any(finding.severe for finding in self.findings)


def check(found: Found, *, workers: int, progress: Callable[[int], None] = lambda done: None) -> Report:
    """Returns the report on all images of a path, each read and decoded once."""
    parts, before = [], 0
    for dataset in found.splits.values():
        parts.append(examine(dataset, workers=workers, progress=_after(before, progress)))
        before += len(dataset)
    examined = joined(parts)
    paths = [
        os.path.normpath(dataset.path(index)) for dataset in found.splits.values() for index in range(len(dataset))
    ]
    labels = np.concatenate([dataset.labels() for dataset in found.splits.values()])
    split_N = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    K = len(found.classes)
    counts = {split: np.bincount(dataset.labels(), minlength=K) for split, dataset in found.splits.items()}
    findings = [Finding("layout", note, [], severe=False) for note in found.notes]
    findings += _broken(examined, paths)
    findings += _twice(examined, paths, labels, split_N, found)
    findings += _balance(counts, found.classes) + _shapes(examined, paths)
    broken = {split: set(part.broken) for split, part in zip(found.splits, parts)}
    return Report(found, counts, examined.size_N2[examined.size_N2[:, 0] > 0], findings, broken)


def _after(before: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: progress(before + done)


def _broken(examined: Examined, paths: Sequence[str]) -> list[Finding]:
    cases = [[paths[number], why] for number, why in sorted(examined.broken.items())]
    if not cases:
        return []
    sentence = (
        f"{_images(len(cases))} cannot be decoded; training stops at one, or leaves it out with data.on_broken=skip"
    )
    return [Finding("broken", sentence, cases, severe=True)]


def _twice(
    examined: Examined, paths: Sequence[str], labels: np.ndarray, split_N: np.ndarray, found: Found
) -> list[Finding]:
    twice = find_duplicates(examined, split_N == 1)
    findings = []
    across = [pair for pair in twice.exact if split_N[pair[0]] != split_N[pair[1]]]
    other = [pair for pair in twice.exact if labels[pair[0]] != labels[pair[1]]]
    within = [pair for pair in twice.exact if split_N[pair[0]] == split_N[pair[1]]]
    for kind, pairs, words, severe in (
        ("leak", across, "of val have the same pixels as one of train, so accuracies are too high", True),
        ("near", twice.near, "of val look like one of train (resized, compressed again, or the next frame)", True),
        ("labels", other, "have the same pixels as one of another class", True),
        ("twice", within, "have the same pixels as another of their split", False),
    ):
        if pairs:
            cases = [[paths[b], paths[a]] for a, b in pairs]
            if kind == "labels":
                cases = [
                    [f"{paths[b]} ({found.classes[labels[b]]})", f"{paths[a]} ({found.classes[labels[a]]})"]
                    for a, b in pairs
                ]
            findings.append(Finding(kind, f"{_images(len(pairs))} {words}", cases, severe))
    if twice.uncompared:
        words = f"{_images(twice.uncompared)} of val look like thousands of others, and were compared by pixels only"
        findings.append(Finding("uncompared", words, [], severe=False))
    return findings


def _balance(counts: dict[str, np.ndarray], classes: Sequence[str]) -> list[Finding]:
    findings = []
    train = next(iter(counts.values()))
    there = np.flatnonzero(train)
    low, high = (int(there[pick(train[there])]) if len(there) else 0 for pick in (np.argmin, np.argmax))
    if train[high] >= _UNEVEN * max(1, train[low]):
        sentence = (
            f"classes are uneven: {classes[high]} has {train[high]:,} images and {classes[low]} {train[low]:,}; "
            "accuracy is then mostly that of large classes"
        )
        findings.append(Finding("uneven", sentence, [], severe=False))
    for split, least in (("train", _FEW_IN_TRAIN), ("", _FEW_IN_TRAIN), ("val", _FEW_IN_VAL)):
        few = [k for k, count in enumerate(counts.get(split, ())) if 0 < count < least]
        if few:
            cases = [[classes[k], _images(int(counts[split][k]))] for k in few]
            where = f" in {split}" if split else ""
            what = "1 class has" if len(few) == 1 else f"{len(few)} classes have"
            findings.append(Finding("few", f"{what} fewer than {least} images{where}", cases, severe=False))
    return findings


def _shapes(examined: Examined, paths: Sequence[str]) -> list[Finding]:
    longer, shorter = examined.size_N2.max(axis=1), examined.size_N2.min(axis=1)
    odd = np.flatnonzero(longer > _ODD_SHAPE * shorter)
    if not len(odd):
        return []
    cases = [[paths[int(number)], "x".join(map(str, examined.size_N2[number]))] for number in odd]
    words = "are over three times as long as wide; evaluation crops their middle (data.eval_crop=false shrinks them)"
    return [Finding("shape", f"{_images(len(odd))} {words}", cases, severe=False)]


def as_text(report: Report) -> str:
    """Returns the report as it is printed."""
    found = report.found
    total = sum(int(counts.sum()) for counts in report.counts.values())
    parts = [f"{int(counts.sum()):,} {split}" for split, counts in report.counts.items() if split]
    inside = f" ({', '.join(parts)})" if parts else ""
    lines = [f"{found.path}: {found.layout}, {len(found.classes)} classes, {_images(total)}{inside}"]
    if len(report.size_N2):
        width, height = report.size_N2.T
        shorter = int(np.median(report.size_N2.min(axis=1)))
        lines.append(
            f"sizes: {width.min()}x{height.min()} to {width.max()}x{height.max()} pixels; the shorter side is "
            f"{shorter} in the middle"
        )
    lines += ["", *_table(report), ""]
    for finding in sorted(report.findings, key=lambda finding: not finding.severe):
        lines.append(f"{'problem' if finding.severe else 'note'}: {finding.sentence}")
        lines += [f"    {': '.join(case)}" for case in finding.cases[:_SHOWN]]
        if len(finding.cases) > _SHOWN:
            lines.append(f"    and {len(finding.cases) - _SHOWN:,} more (--json lists all)")
    lines += [] if report.findings else ["nothing is wrong with them"]
    return "\n".join(lines)


def _table(report: Report) -> list[str]:
    classes, counts = report.found.classes, list(report.counts.values())
    first = counts[0]
    order = list(range(len(classes)))
    skipped = ""
    if len(order) > _MOST_ROWS:
        by_size = sorted(order, key=lambda k: (first[k], k))
        skipped = f"  ... {len(order) - _MOST_ROWS:,} more, between these"
        order = by_size[::-1][: _MOST_ROWS // 2] + by_size[: _MOST_ROWS // 2][::-1]
    width = min(40, max(len(classes[k]) for k in order))
    heads = [split or "images" for split in report.counts]
    rows = [f"  {'class':<{width}}  {'  '.join(f'{head:>8}' for head in heads)}"]
    for k in order:
        rows.append(f"  {classes[k][:width]:<{width}}  {'  '.join(f'{count[k]:>8,}' for count in counts)}")
    if skipped:
        rows.insert(1 + _MOST_ROWS // 2, skipped)
    return rows


def as_tree(report: Report) -> dict[str, Any]:
    """Returns the report as JSON holds it."""
    size = report.size_N2
    return {
        "path": str(report.found.path),
        "layout": report.found.layout,
        "classes": {
            name: {split or "images": int(counts[k]) for split, counts in report.counts.items()}
            for k, name in enumerate(report.found.classes)
        },
        "width": [int(size[:, 0].min()), int(size[:, 0].max())] if len(size) else [],
        "height": [int(size[:, 1].min()), int(size[:, 1].max())] if len(size) else [],
        "clean": report.is_clean,
        "findings": [
            {"kind": f.kind, "severe": f.severe, "sentence": f.sentence, "cases": f.cases} for f in report.findings
        ],
    }


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"

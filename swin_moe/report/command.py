"""`swin-moe report RUN ...`: one page of runs that opens without a network."""

import argparse
import sys
from pathlib import Path

from swin_moe.checkpoint.errors import describe
from swin_moe.config.arguments import Parser
from swin_moe.report.records import Run, read_runs
from swin_moe.run.session import run_main

_EXAMPLES = """examples:
  of one run, into its folder
    swin-moe report output/digits_swin_moe
  several side by side, and the pictures as files
    swin-moe report output/dense output/experts --out compare.html --pictures
  of a run on another machine's data
    swin-moe report output/flowers data.path=/data/flowers"""
_IMAGES = 2000


def main(argv: list[str]) -> None:
    """Writes the page and prints its path."""
    options = _parse(argv)
    from swin_moe.report import page  # after wrong words were refused: it loads torch

    runs = read_runs([word for word in options.words if "=" not in word or Path(word).is_dir()])
    overrides = [word for word in options.words if "=" in word and not Path(word).is_dir()]
    found, notes = [], []
    for run in runs:
        results, note = (None, "") if options.images == 0 else _look(run, options.images, overrides)
        found.append(results)
        notes += [note] if note else []
    target = Path(options.out) if options.out else runs[0].directory / "report.html"
    text, figures = page.build(runs, found, notes)
    page.write(text, figures, target, options.pictures)
    for note in notes:
        print(note, file=sys.stderr)
    print(target)


def _look(run: Run, most: int, overrides: list[str]):  # type: ignore[no-untyped-def]
    """Returns (what its network does on validation images, ""), or (None, why that is not known)."""
    from swin_moe.report.results import look

    try:
        return look(run.directory, most, overrides), ""
    except (ValueError, OSError) as error:  # a page of what is known is better than none
        return None, f"{run.name}: nothing is shown of its validation images: {describe(error)}"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="swin-moe report",
        description="One HTML page of runs: their records, experts, validation images, configuration.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="RUN", help="folder of a run; key=value: an option for its validation images")
    add("--out", default="", metavar="FILE.html", help="the page (default: report.html in the first run's folder)")
    add("--pictures", action="store_true", help="also write every picture as a PNG, into a folder beside the page")
    add("--images", type=int, default=_IMAGES, metavar="N", help=f"validation images at most ({_IMAGES}); 0 = none")
    options = parser.parse_intermixed_args(argv)
    if options.images < 0:
        raise ValueError(f"swin-moe report: --images must be >= 0, got {options.images}")
    return options


if __name__ == "__main__":
    run_main(main)

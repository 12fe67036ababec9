"""`swin-moe report RUN ...`: one page of runs that opens without a network."""

import sys
from pathlib import Path

from swin_moe.checkpoint.errors import describe
from swin_moe.report.records import Run, read_runs
from swin_moe.run.session import run_main
from swin_moe.usage import parsers


def main(argv: list[str]) -> None:
    """Writes the page and prints its path."""
    options = parsers.report(argv)
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


if __name__ == "__main__":
    run_main(main)

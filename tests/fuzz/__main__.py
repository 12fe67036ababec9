"""`python -m tests.fuzz SEED:FIRST[-END]` repeats one case, or runs a range and counts its outcomes as a table.

`serve` runs what a Runner asks for.
"""

import collections
import sys
import tempfile
from pathlib import Path

from tests.fuzz.cases import draw_case
from tests.fuzz.children import Result, Runner, serve
from tests.fuzz.files import make_files


def table(results: list[Result]) -> str:
    """Returns the counts per kind and command as a table of Markdown."""
    counts = collections.Counter((r.kind, r.command if r.kind != "command" else "-", r.outcome) for r in results)
    lines = ["| kind | command | inputs | refused | works | wrong |", "|---|---|---|---|---|---|"]
    for kind, command in sorted({key[:2] for key in counts}):
        row = [counts[kind, command, outcome] for outcome in ("refused", "works", "wrong")]
        lines.append(f"| {kind} | {command} | {sum(row)} | {' | '.join(map(str, row))} |")
    row = [sum(r.outcome == outcome for r in results) for outcome in ("refused", "works", "wrong")]
    return "\n".join([*lines, f"| all | | {sum(row)} | {' | '.join(map(str, row))} |"])


def main() -> None:
    """Runs what the argument names."""
    if sys.argv[1] == "serve":
        return serve()
    seed, _, numbers = sys.argv[1].partition(":")
    first, dash, end = numbers.partition("-")
    chosen = range(int(first), int(end) if dash else int(first) + 1)
    with tempfile.TemporaryDirectory() as name, Runner() as runner:
        folder = Path(name)
        files = make_files(folder / "files")
        results = runner.run_cases(int(seed), chosen, files, folder / "work")
        for result in results:
            case = draw_case(int(seed), result.number, files, folder / "work")
            if result.outcome == "wrong":
                print(f"{result.number}: {result.report(int(seed), case)}\n")
            elif not dash:
                print(f"{result.outcome}: {case.text}\n  {result.said[-1500:]}")
        print(table(results))
    sys.exit(any(result.outcome == "wrong" for result in results))


if __name__ == "__main__":
    main()

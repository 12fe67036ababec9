"""`swin-moe weights list | fetch | path`: the released official files, on this disk or not."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from swin_moe.checkpoint.errors import describe
from swin_moe.config.arguments import command_parser, print_answer
from swin_moe.config.shipped.released import Released, find, of_config, released
from swin_moe.weights.fetch import Progress, check, default_folder, fetch, place

_EXAMPLES = """examples:
  which files there are of Swin-B; detectors
    swin-moe weights list swin_base
    swin-moe weights list --task detect
  one of them, to begin a run with
    swin-moe weights fetch swin_base_patch4_window7_224_22k
    swin-moe train CONFIG checkpoint.init=$(swin-moe weights path swin_base_patch4_window7_224_22k)
  on a cluster without a way out: fetched elsewhere, put where all nodes see it
    SWIN_MOE_WEIGHTS=/shared/weights swin-moe weights path swin_base_patch4_window7_224_22k"""


_SCORES = {
    "classify": ("acc@1", "acc@5"),
    "detect": ("box AP", "mask AP"),
    "segment": ("mIoU", "mIoU (ms)"),
}


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about what is wrong."""
    return print_answer(lambda: _answer(parse(argv)), describe)


def parse(argv: list[str] | None) -> Any:
    """Returns the options; raises ValueError for wrong ones."""
    parser = command_parser("weights", "The released official files of weights.", _EXAMPLES)
    add = parser.add_argument
    add("verb", choices=("list", "fetch", "path"), help="show them; fetch some; where one lies, for other commands")
    add("names", nargs="*", metavar="NAME", help="of weights, or of a config they were released for; list: any words")
    add("--folder", type=Path, default=None, metavar="DIR", help=f"where they lie (default: {default_folder()})")
    add("--json", action="store_true", help="list: as JSON")
    add("--task", choices=tuple(_SCORES), help="list: only those of a task")
    words = sys.argv[1:] if argv is None else argv
    if words and (words[0] in released() or any(row.config == words[0] for row in released().values())):
        raise ValueError(f"swin-moe weights: fetch, path or list comes first: swin-moe weights fetch {words[0]}")
    options = parser.parse_args(argv)
    if (there := _no_folder(options.folder)) is not None:
        raise ValueError(
            f"--folder {options.folder}: {there} is a file; give a folder, which is made where it is not there"
        )
    if options.verb != "list" and not options.names:
        raise ValueError(f"swin-moe weights {options.verb} needs the name of weights; `swin-moe weights list` has them")
    if options.verb == "path" and len(options.names) > 1:
        raise ValueError("swin-moe weights path takes one name")
    if (options.json or options.task) and options.verb != "list":
        raise ValueError("--json and --task are for list")
    return options


def _no_folder(folder: Path | None) -> Path | None:
    """Returns what stands in the way of a folder: itself or a part of its path that is there and none; else None."""
    parts = [] if folder is None else [folder, *folder.parents]
    return next((part for part in parts if os.path.lexists(part) and not part.is_dir()), None)


def by_name(name: str) -> Released:
    """Returns the file of a name, or the one that was released for the config of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in released() and any(row.config == name for row in released().values()):
        return of_config(name)
    return find(name)


def _answer(options: Any) -> str:
    if options.verb == "list":
        return _list(options.names, options.folder, options.json, options.task)
    if options.verb == "fetch":
        lines = []
        for row in [by_name(name) for name in options.names]:
            path = fetch(row, options.folder, show=Progress(row.name))
            lines.append(f"{path}  sha256 {check(row, options.folder)}")
        return "\n".join(lines)
    row = by_name(options.names[0])
    path = place(row, options.folder)
    if not path.is_file():
        raise ValueError(f"{path} is not there; fetch it with: swin-moe weights fetch {row.name}")
    return str(fetch(row, options.folder))


def _list(words: list[str], folder: Path | None, as_json: bool, task: str | None) -> str:
    rows = [row for row in released().values() if all(word in f"{row.name} {row.config}" for word in words)]
    rows = [row for row in rows if task in (None, row.task)]
    if not rows:
        of = f" of {task}" if task else ""
        raise ValueError(
            f"no released weights{of} have {' and '.join(map(repr, words))} in their name; `swin-moe weights list` "
            f"has all"
        )
    if as_json:
        return json.dumps([vars(row) | {"here": place(row, folder).is_file()} for row in rows], indent=1)
    width, lines = max(len(row.name) for row in rows), []
    for kind, heads in _SCORES.items():
        of_kind = [row for row in rows if row.task == kind]
        wide = [max(5, len(head)) for head in heads]
        if of_kind:
            lines.append(f"  {'name':<{width}}  {heads[0]:>{wide[0]}}  {heads[1]:>{wide[1]}}  trained on")
        for row in of_kind:
            here = "*" if place(row, folder).is_file() else " "
            found = (row.top1, row.top5) if kind == "classify" else row.scores
            first, second = ("-" if value is None else f"{value:g}" for value in found)
            lines.append(f"{here} {row.name:<{width}}  {first:>{wide[0]}}  {second:>{wide[1]}}  {row.data}")
    return "\n".join([*lines, f"* = in {folder or default_folder()}"])

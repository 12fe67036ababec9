"""`swin-moe configs [WORD ...]`: the shipped configs by folder, with size, operations, accuracy and weights."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from swin_moe.config.arguments import command_parser, print_answer
from swin_moe.config.io import config_files, config_folder, load_config
from swin_moe.config.shipped.released import all_of_config

_EXAMPLES = """examples:
  all of SwinV2 with windows of 16
    swin-moe configs swinv2 window16
  those with experts, as JSON
    swin-moe configs expert --json
  every option of one of them
    swin-moe show swin_tiny_patch4_window7_224"""
_HEAD = ("parameters", "GMACs", "image", "acc@1", "weights")


@dataclass(frozen=True)
class Shipped:
    """A shipped config and what is known of its network."""

    name: str
    folder: str
    parameters: int | None  # of the network without what a task adds to it; None = not counted
    operations: float | None  # multiply-accumulates of one image, as model.flops() counts
    image: tuple[int, int] | None  # height, width; None = any
    top1: float | None  # published, per cent; None = not, or of several files
    weights: tuple[str, ...]  # names of the files that were released for it


def shipped(words: list[str]) -> dict[str, list[str]]:
    """Returns folder -> names of the shipped configs with every word in them, but for bases, which are no runs."""
    found: dict[str, list[str]] = {}
    for path in config_files():
        folder = path.parent.name
        if path.parent != config_folder() and all(word in f"{folder}/{path.stem}" for word in words):
            found.setdefault(folder, []).append(path.stem)
    return found


def describe(words: list[str]) -> list[Shipped]:
    """Returns the shipped configs with every word in their name, by folder."""
    counted, rows = _counts(), []
    for folder, names in shipped(words).items():
        for name in names:
            parameters, operations = counted.get(name, (None, None))
            files = all_of_config(name)
            top1 = files[0].top1 if len(files) == 1 else None
            config = load_config(name)
            image = None if config.task.options.any_size else config.model.img_size
            weights = tuple(file.name for file in files)
            rows.append(Shipped(name, folder, parameters, operations, image, top1, weights))
    return rows


def run(argv: list[str] | None = None) -> None:
    """Prints the table; ends with exit code 2 where no name holds the words."""
    code = print_answer(lambda: _answer(_parse(argv)))
    if code:
        sys.exit(code)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("configs", "The shipped configs whose names contain every word.", _EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of a name or folder")
    parser.add_argument("--json", action="store_true", help="as a list")
    return parser.parse_args(argv)


def _answer(options: argparse.Namespace) -> str:
    rows = describe(options.words)
    if not rows:
        raise ValueError(f"no shipped config has {' and '.join(map(repr, options.words))} in its name")
    if options.json:
        return json.dumps([asdict(row) for row in rows], indent=1)
    cells = [_cells(row) for row in rows]
    first = max(len(row.name) for row in rows)
    widths = [max(len(line[i]) for line in [*cells, _HEAD]) for i in range(len(_HEAD) - 1)]
    lines, folder = [_line(f"  {'':<{first}}", _HEAD, widths)], ""
    for row, line in zip(rows, cells):
        if row.folder != folder:
            folder = row.folder
            lines.append(f"{folder}/")
        lines.append(_line(f"  {row.name:<{first}}", line, widths))
    return "\n".join(lines)


def _line(start: str, cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join([start, *(f"{text:>{width}}" for text, width in zip(cells, widths)), cells[-1]]).rstrip()


def _cells(row: Shipped) -> tuple[str, ...]:
    height, width = row.image or (0, 0)
    return (
        "-" if row.parameters is None else _counted(row.parameters),
        "-" if row.operations is None else f"{row.operations / 1e9:.3g}",
        "any" if row.image is None else str(height) if height == width else f"{height}x{width}",
        "-" if row.top1 is None else f"{row.top1:g}",
        _named(row),
    )


def _named(row: Shipped) -> str:
    if len(row.weights) != 1:
        return f"{len(row.weights)} files" if row.weights else ""
    return "yes" if row.weights[0] == row.name else row.weights[0]


def _counted(number: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


def _counts() -> dict[str, tuple[int, float]]:
    """Returns name of a config -> (parameters, multiply-accumulates), of configs/counts.tsv."""
    found: dict[str, tuple[int, float]] = {}
    for line in (config_folder() / "counts.tsv").read_text().splitlines():
        if line and not line.startswith("#"):
            name, parameters, operations = line.split("\t")
            found[name] = int(parameters), float(operations)
    return found

"""How verbs print: sizes, tables, names of what a tensor belongs to."""

import argparse
import re
from collections.abc import Iterable, Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def format_bytes(number: float) -> str:
    """Returns a number of bytes for people: "512 B", "1.21 GiB"."""
    power = 0
    while number >= 1000 and power < len(_UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.3g} {_UNITS[power]}" if number < 1000 else f"{number:.0f} {_UNITS[power]}"


def parse_bytes(text: str) -> int:
    """Returns the bytes of "512M", "1.5GiB" or "4096"; units are powers of 1024.

    Raises:
        ArgumentTypeError: It is no size; argparse names the option.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is a number with K, M, G or T, such as 512M; got {text!r}")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns rows in aligned columns; numbers to the right."""
    cells = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() or not row[i] for row in cells[1:]) for i in range(len(header))]
    lines = (
        "  ".join(f"{cell:>{w}}" if right else f"{cell:<{w}}" for cell, w, right in zip(row, widths, numeric))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def shortened(text: str, width: int = 60) -> str:
    """Returns a text of at most `width` characters: its beginning and its end where it is longer."""
    return text if len(text) <= width else f"{text[: width - 20]} ... {text[-15:]}"


def split_kind(name: str) -> tuple[str, str]:
    """Returns (what it is, whose): ("exp_avg", "head.bias") of "optim.exp_avg/head.bias"; a parameter is "weight"."""
    kind, slash, parameter = name.partition("/")
    return (kind.removeprefix("optim."), parameter) if slash else ("weight", name)

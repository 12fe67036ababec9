"""Short forms of many host names, as Slurm, Flux and people write them: n[01-04,7]-ib."""

import itertools
import re
import string
from collections.abc import Sequence

_RANGES = r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*"
_NAME = rf"(?:[\w.:-]|\[{_RANGES}\])+"


def expand(text: str) -> list[str]:
    """Returns the hosts of a list: "a,n[01-03,7]" is a, n01, n02, n03, n7; of several brackets the last runs fastest.

    Raises:
        ValueError: Unclosed brackets, or no ranges in them, or an empty name.
    """
    if not re.fullmatch(f"{_NAME}(?:,{_NAME})*", text):
        raise ValueError(f"cannot read the node list {text!r}; expected names like n1,n[02-05]")
    hosts: list[str] = []
    for name in re.findall(_NAME, text):
        parts = re.split(rf"\[({_RANGES})\]", name)  # plain, ranges, plain, ranges, ..., plain
        choices = [_expand_ranges(part) if number % 2 else [part] for number, part in enumerate(parts)]
        hosts += ["".join(chosen) for chosen in itertools.product(*choices)]
    return hosts


def compress(names: Sequence[str]) -> str:
    """Returns a list that `expand` makes these names of, in this order: n01, n02, n03, x is "n[01-03],x".

    Only numbers that end a name are counted, as Slurm takes no others.
    """
    found: list[tuple[str, list[str]]] = []  # (plain, the first and the last number)
    for name in names:
        plain = name.rstrip(string.digits)
        number = name[len(plain) :]
        before, ends = found[-1] if found else ("", [""])
        if number and ends[-1] and plain == before and number == str(int(ends[-1]) + 1).zfill(len(ends[0])):
            ends[1:] = [number]
        else:
            found.append((plain, [number]))
    return ",".join(f"{plain}[{'-'.join(ends)}]" if ends[1:] else plain + ends[0] for plain, ends in found)


def expand_counts(text: str) -> list[int]:
    """Returns the counts per node of Slurm's short form: "4(x2),3" is 4, 4, 3."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if not match:
            raise ValueError(f"cannot read the Slurm task counts {text!r}; expected counts like 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand_ranges(ranges: str) -> list[str]:
    """Returns the zero-padded numbers of "01-03,7"."""
    names: list[str] = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        names += [str(i).zfill(len(low)) for i in range(int(low), int(high or low) + 1)]
    return names

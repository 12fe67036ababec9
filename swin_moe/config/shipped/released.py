"""The released official files of weights by name: configs/released*.tsv as rows. Plain data, no torch, no network."""

import difflib
from dataclasses import dataclass
from functools import cache

from swin_moe.config.checks import shown
from swin_moe.config.io import config_folder

_BY_HAND = "https://drive.google.com/"  # shows a page for a browser before it gives a file


@dataclass(frozen=True)
class Released:
    """One file of weights and what was published of it."""

    name: str
    config: str  # of configs/, "" = none was released
    data: str  # what it was trained on, in this order
    top1: float | None  # per cent; None = not published
    top5: float | None
    address: str
    task: str = "classify"  # or detect, segment
    # detect: box AP and mask AP; segment: mIoU, and with several scales and flips; classify: none, see top1.
    scores: tuple[float | None, float | None] = (None, None)

    @property
    def file(self) -> str:
        """Returns the name of the file that is kept."""
        last = self.address.rpartition("/")[2]
        return f"{self.name}.pth" if self.by_hand else last

    @property
    def by_hand(self) -> bool:
        """Returns whether only a browser gets it."""
        return self.address.startswith(_BY_HAND)

    @property
    def is_archive(self) -> bool:
        """Returns whether it holds a file a rank."""
        return self.file.endswith(".zip")


@cache
def released() -> dict[str, Released]:
    """Returns every released file by its name."""
    rows = {}
    for name, config, data, top1, top5, address in _lines("released.tsv"):
        rows[name] = Released(name, "" if config == "-" else config, data, _number(top1), _number(top5), address)
    for name, config, task, data, first, second, address in _lines("released_dense.tsv"):
        scores = (_number(first), _number(second))
        rows[name] = Released(name, "" if config == "-" else config, data, None, None, address, task, scores)
    return rows


def _lines(file: str) -> list[list[str]]:
    lines = (config_folder() / file).read_text().splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def find(name: str) -> Released:
    """Returns the file of a name, with or without its ending.

    Raises:
        ValueError: There is none; says which are near.
    """
    known = released()
    found = known.get(name) or next((row for row in known.values() if row.file == name), None)
    if found is None:
        near = difflib.get_close_matches(name, known, n=3) or [other for other in known if name in other][:3]
        hint = f"did you mean {', '.join(near)}?" if near else "`swin-moe weights list` has all"
        raise ValueError(f"no released weights are called {shown(name)}; {hint}")
    return found


def all_of_config(config: str) -> list[Released]:
    """Returns the files that were released for a config: one of its own name, else all."""
    rows = [row for row in released().values() if row.config == config]
    return [row for row in rows if row.name == config] or rows


def of_config(config: str) -> Released:
    """Returns the file that was released for a config.

    Raises:
        ValueError: There is none, or several and none of the config's own name; names them.
    """
    rows = all_of_config(config)
    if not rows:
        raise ValueError(
            f"no weights were released for the config {config!r}; `swin-moe weights list` has those that were"
        )
    if len(rows) > 1:
        names = [row.name for row in rows]
        some = ", ".join(names[:3])
        raise ValueError(
            f"{len(rows)} files of weights were released for the config {config!r} ({some}, ...); name one of them: "
            f"pretrained={names[-1]!r}"
        )
    return rows[0]


def _number(text: str) -> float | None:
    return None if text == "-" else float(text)

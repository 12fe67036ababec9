"""What --set may say, and which formats heed it; each format's module tells what it means there.

A setting that neither the source's format nor the output's heeds would change nothing, and nobody would notice.
"""

import difflib

from checkpoint_tools.sources.base import Options, Source

# Key -> (formats whose reader heeds it, formats whose writer does). None: every reader.
SETTINGS: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "counts": ((), ("official", "official-moe", "simmim", "tutel")),
    "encoder": (("simmim",), ()),
    "form": ((), ("official-moe", "tutel")),
    "img_size": (None, ()),
    "network": ((), ("dense",)),
    "step": (("native", "official", "official-moe", "fairscale", "simmim", "tutel", "dcp"), ()),
    "window_size": (None, ()),
}
_RANK_FILES = ("official-moe", "tutel")  # formats that are written as --world files


def check_settings(options: Options) -> None:
    """Raises ValueError for a --set that no format knows: a typo would have no effect."""
    for key in sorted(options.extra.keys() - SETTINGS.keys(), key=str):
        if not key:
            raise ValueError(f"--set takes KEY=VALUE; keys: {', '.join(SETTINGS)}")
        near = difflib.get_close_matches(str(key), SETTINGS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--set {key} is unknown; {meant}allowed: {', '.join(SETTINGS)}")


def check_heeded(source: Source, to: str, options: Options, known: tuple[str, ...]) -> None:
    """Raises ValueError for a --set that neither this source's format nor the format `to` heeds.

    known: Names of our formats; one from outside may heed anything.
    """
    while (base := getattr(source, "base", None)) is not None:  # what a verb made of a source
        source = base
    if source.format not in known or to not in known:
        return
    for key in sorted(options.extra):
        readers, writers = SETTINGS[key]
        if readers is None or source.format in readers or to in writers:
            continue
        used = [f"--from {name}" for name in readers] + [f"--to {name}" for name in writers]
        raise ValueError(
            f"--set {key}={options.extra[key]} has no effect on what is read as {source.format} and written as {to}; "
            f"it is for {', '.join(used)}"
        )


def check_world(to: str, world: int) -> None:
    """Raises ValueError for a --world where the format `to` has no rank files; 0 is none given."""
    if world and to not in _RANK_FILES:
        raise ValueError(f"--world {world} has no effect on --to {to}; it is for --to {', --to '.join(_RANK_FILES)}")

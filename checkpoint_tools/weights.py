"""Checkpoints of any format as networks load them: the one door through which swin_moe reads what is not its own."""

from collections.abc import Callable
from pathlib import Path

from checkpoint_tools.formats import find_format, open_source
from checkpoint_tools.formats.official.simmim import is_moby
from checkpoint_tools.formats.state_dict import peek
from checkpoint_tools.sources.assembled import AssembledSource
from checkpoint_tools.sources.base import Options, Source

PRETRAINED = "encoder."  # before the names of a file that was pre-trained without classes


def open_weights(path: Path, *, report: Callable[[str], None]) -> Source:
    """Returns the opened checkpoint at `path`, whose tensors have our names.

    Files of SimMIM and MoBY keep "encoder." before the backbone's names, and SimMIM's its decoder and mask token. Where
    ranks hold copies that differ, the first counts, and is told when it is read.

    Args:
        report: Called with sentences for the user.

    Raises:
        CheckpointError: It is of no known format, or refused.
        CorruptionError: It is cut off or contradicts itself.
    """
    form = find_format(path, advice=False)
    kept = form == "simmim" and not is_moby(peek(path))
    options = Options(on_drift="first", extra={"encoder": "keep"} if kept else {}, report=report)
    return open_source(path, options, form)


def with_tables(source: Source) -> AssembledSource | None:
    """Returns the source itself where it has coordinate tables, which tell the windows it was trained with."""
    return source if isinstance(source, AssembledSource) and source.tables else None


def prefix_of(source: Source) -> str:
    """Returns what has to stand before a source's names, so that they tell how it was trained."""
    pretrained = source.format == "simmim" and not any(name.startswith(PRETRAINED) for name in source.tensors)
    return PRETRAINED if pretrained else ""

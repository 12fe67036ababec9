"""Checkpoints to convert, and ways to run the tools on them. Imports no torch."""

from pathlib import Path
from typing import Any

from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options
from checkpoint_tools.sources.stream import write_native
from swin_moe.checkpoint.save import write_checkpoint
from tests.checkpoint.samples import CONFIG, FILE_SIZE, STATE, sample_state, whole_pieces


def save(root: Path, seed: int = 0, *, step: int = 1, state=None, **options: Any) -> Path:
    """Returns a saved sample checkpoint."""
    pieces = whole_pieces(sample_state(seed) if state is None else state)
    usual: dict[str, Any] = {"state": STATE, "config": CONFIG, "file_size": FILE_SIZE, "provenance": {"time": "then"}}
    return write_checkpoint(root, step, pieces, **usual | options)


def convert(source: Path, target: Path, **given: Any) -> Path:
    """Returns the native checkpoint written from any source."""
    usual: dict[str, Any] = {"file_size": FILE_SIZE, "report": lambda text: None}
    options = Options(**usual | given)
    with open_source(source, options) as opened:
        write_native(opened, target, options)
    return target

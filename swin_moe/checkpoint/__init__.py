"""Checkpoints: one format for every layout, engine and number of ranks. docs/checkpoint_format.md specifies it.

save.py writes, load.py reads, index.py says where bytes lie, manager.py keeps those of a run. There is no table:
formats of other programs are rows of checkpoint_tools. Nothing here imports torch before a tensor needs it.
"""

from swin_moe.checkpoint.communicator import resolve, together
from swin_moe.checkpoint.directory import find_latest, list_checkpoints, mark_best, read_best
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import verify
from swin_moe.checkpoint.manager import CheckpointManager, find_checkpoint, load, load_newest_valid, save
from swin_moe.checkpoint.pieces import Piece

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "CorruptionError",
    "Index",
    "Piece",
    "find_checkpoint",
    "find_latest",
    "list_checkpoints",
    "load",
    "load_newest_valid",
    "mark_best",
    "read_best",
    "resolve",
    "save",
    "together",
    "verify",
]

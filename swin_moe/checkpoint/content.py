"""What a checkpoint can hold beside its tensors' bytes, checked before any of it is written. Imports no torch.

Saving (save.py) and converting (checkpoint_tools/sources/stream.py) ask the same, so that neither writes what a reader
refuses.
"""

import sys

from swin_moe.checkpoint.digest import HEX_DIGITS
from swin_moe.checkpoint.index import MAX_STEP
from swin_moe.checkpoint.sealed_json import check_json

PROVENANCE = "provenance.json"  # beside the index; no part of the checkpoint's identity
FILE_SIZE = 1 << 30  # bytes of data that a file is filled to


def check_content(step: object, *, state: object, config: object, file_size: object, algorithm: str) -> None:
    """Raises ValueError for what no index can hold, naming it.

    Args:
        file_size: Bytes of data that a file is filled to. algorithm: Of the digests.
    """
    check_step(step)
    if sys.byteorder != "little":
        raise ValueError("checkpoints are little-endian; this machine is not")
    check_object(state, "state")
    check_object(config, "config")
    if type(file_size) is not int or file_size <= 0:
        raise ValueError(f"checkpoint.file_size must be a number of bytes > 0, got {file_size!r}")
    if algorithm not in HEX_DIGITS:
        raise ValueError(f"digest {algorithm!r} is unknown; allowed: {', '.join(HEX_DIGITS)}")


def check_step(step: object) -> None:
    """Raises ValueError for a step that a checkpoint cannot be of."""
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise ValueError(f"the step of a checkpoint must be a whole number in [0, {MAX_STEP}], got {step!r}")


def check_object(value: object, name: str) -> None:
    """Raises ValueError for what is not a JSON object."""
    check_json(value, name)
    if type(value) is not dict:
        raise ValueError(f"{name} must be a dict, got {type(value).__name__}")


def check_name(name: str) -> None:
    """Raises ValueError for a tensor name that an index refuses."""
    if not 0 < len(name) <= 4096 or not name.isprintable():
        raise ValueError(f"tensor name {name[:80]!r} must be printable text of 1 to 4096 characters")

"""Saving while training goes on: a copy of this rank's share is taken, a thread writes it.

One save at a time, so that host memory holds at most one copy. The ranks agree on the plan before the copy, in the
calling thread; from then on only the thread uses the communicator, which therefore must be no group of training's.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from swin_moe.checkpoint.pieces import Piece, array_to_raw
from swin_moe.checkpoint.save import PlannedSave, complete_save, plan_save
from swin_moe.layout import Chunk


class BackgroundSaver:
    """Saves in a thread; every rank calls the same methods in the same order."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies: dict[tuple[str, Chunk], Any] = {}  # kept for the next save: new memory is slower than the copy

    @property
    def failed(self) -> bool:
        """True once the running save has failed; `wait` raises why. The other ranks' save fails too, soon."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when no save is running any more.

        Raises:
            CheckpointError: The last save failed; once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def start(
        self,
        root: str | Path,
        step: int,
        pieces: Iterable[Piece],
        *,
        to_raw: Callable[[Any], np.ndarray] = array_to_raw,
        **options: Any,
    ) -> Path:
        """Returns where the checkpoint will be published, once the pieces may change; see save.write_checkpoint.

        Raises:
            CheckpointError: On every rank: the save before this one failed, or this one cannot be planned.
        """
        self.wait()
        pieces = list(pieces)
        planned = plan_save(root, step, pieces, **options)
        copies = self._copy(pieces, {(share.name, share.piece) for share in planned.shares})
        # Not a daemon, whatever thread calls: the interpreter waits for it, or it would end in the middle of the save.
        arguments = (planned, copies, to_raw)
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=False)
        self._thread.start()
        return planned.path

    def _run(self, planned: PlannedSave, pieces: list[Piece], to_raw: Callable[[Any], np.ndarray]) -> None:
        try:
            complete_save(planned, pieces, to_raw)
        except BaseException as error:  # noqa: BLE001 - raised again by wait, in the thread that trains
            self._error = error

    def _copy(self, pieces: list[Piece], needed: set[tuple[str, Chunk]]) -> list[Piece]:
        """Returns copies, on the host, of the pieces that this rank writes."""
        old, self._copies = self._copies, {}
        result, on_device = [], False
        for piece in pieces:
            key = piece.name, piece.chunk
            if key in needed and key not in self._copies:
                copy, is_busy = _copy_tensor(piece.tensor, old.pop(key, None))
                self._copies[key], on_device = copy, on_device or is_busy
                result.append(dataclasses.replace(piece, tensor=copy))
        if on_device:
            import torch

            torch.cuda.synchronize()
        return result


def _copy_tensor(tensor: Any, old: Any) -> tuple[Any, bool]:
    """Returns (a copy of a tensor or array on the host, in `old` if that fits; whether the device still writes it)."""
    fits = old is not None and type(old) is type(tensor) and (old.shape, old.dtype) == (tensor.shape, tensor.dtype)
    if isinstance(tensor, np.ndarray):
        copy = old if fits else np.empty_like(tensor)
        np.copyto(copy, tensor)
        return copy, False
    import torch

    tensor = tensor.detach()
    if not fits:
        old = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    old.copy_(tensor, non_blocking=True)
    return old, tensor.is_cuda

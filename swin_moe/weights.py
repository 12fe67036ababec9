"""Weights for evaluation and prediction: from a checkpoint of this system in any layout, or an official file."""

from pathlib import Path

import torch
from torch import nn

from swin_moe.checkpoint import CheckpointManager, Piece
from swin_moe.parallel.apply import parameter_layout
from swin_moe.session import Session


def load_weights(model: nn.Module, session: Session) -> str:
    """Fills the model from checkpoint.load, or from the newest checkpoint of the run; returns what was loaded.

    Averaged weights (EMA) are taken where the checkpoint has them.

    Raises:
        ValueError: Nothing to load, or the checkpoint does not fit the model.
    """
    source = session.config.checkpoint.load
    if source.endswith((".pth", ".pt")):
        return _load_official_file(model, session, Path(source))
    layout = parameter_layout(model, session.groups)
    pieces = [Piece(n, layout[n][0], p.dtype, layout[n][1], p.detach()) for n, p in model.named_parameters()]
    manager = CheckpointManager(session.directory / "checkpoints", group=session.groups.world)
    return manager.load_parameters(pieces, source=source)


def _load_official_file(model: nn.Module, session: Session, path: Path) -> str:
    """Loads an official file; its pickled config is refused by weights_only, as anything that is not a tensor."""
    from swin_moe.models.official import load_official

    if not path.is_file():
        raise ValueError(f"checkpoint.load={path}: no such file")
    if session.world_size > 1 and session.config.model.moe.has_blocks:
        raise ValueError(f"checkpoint.load={path}: an official MoE file is read by one process; run without a launcher")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds; all mean that the file is not plain tensors
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint.load={path} cannot be read as plain tensors: {reason}") from error
    return f"{path}: {load_official(model, state)}"

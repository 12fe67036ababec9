"""The rank files of tests/golden/official_moe, and what the tests of converting them share."""

import json
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.formats import open_source, write_checkpoint
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint import Piece, load
from swin_moe.checkpoint.index import Index
from tests.models.reference import GOLDEN

FILES = GOLDEN / "official_moe"
NAMES = json.loads((GOLDEN / "state_dict_keys.json").read_text())
FORMS = {"epoch": "ckpt_epoch_7.pth", "final": "ckpt_epoch_final.pth"}
QUIET: dict[str, Any] = {"report": lambda text: None}


def torch_load(path) -> dict:
    return torch.load(path, weights_only=False)


def convert(source: Path, target: Path, to: str = "native", *, start: str = "", **given: Any) -> Path:
    options = Options(**{**QUIET, **given})
    with open_source(source, options, start) as opened:
        write_checkpoint(opened, target, options, to)
    return target


def tensors_of(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Returns every tensor of a native checkpoint whose name begins with a prefix."""
    stored = Index.read(path).tensors
    pieces = [Piece.of(n, torch.empty(t.shape)) for n, t in stored.items() if n.startswith(prefix)]
    load(path, pieces)
    return {piece.name: piece.tensor for piece in pieces}


def identity(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != "provenance.json"}

"""Weights from elsewhere: to evaluate and predict with, or for a new run to begin with.

A source is a checkpoint of this system, of any task and in any layout, or an official file. Every rank reads only what
it holds, except of tensors that have to be changed to fit (bias tables of another window, class heads).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swin_moe.checkpoint import CheckpointManager, Index, Piece, find_checkpoint, find_latest, load, resolve, together
from swin_moe.config import ModelConfig
from swin_moe.config_io import config_from_tree
from swin_moe.engine.base import Engine
from swin_moe.layout import Chunk
from swin_moe.models.attention import stage_geometry
from swin_moe.models.official import LoadReport, fit_weights, unwrap
from swin_moe.parallel.apply import parameter_layout
from swin_moe.session import Session

_AVERAGE = "ema/"
_NAMES_SHOWN = 160  # characters
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source(Protocol):
    """Named global tensors that are read in parts."""

    description: str

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Returns every tensor by name; one of the shape wanted may be on meta, and is then read by `fill`.

        shapes: Global shapes wanted, by name without "encoder.".
        """

    def fill(self, pieces: list[Piece]) -> None:
        """Fills pieces, whose names are those of the network's parameters, from tensors that were on meta."""

    def model_config(self) -> ModelConfig | None:
        """Returns the network the weights were trained in, where the source tells."""


class OwnCheckpoint:
    """A checkpoint of this system; averaged weights (EMA) are taken where it has them."""

    def __init__(self, path: Path) -> None:
        self.index = Index.read(path)
        # Momentum networks follow the online ones, so a new run's begin where those do.
        other = ("optim.", "master/", "momentum_", _AVERAGE)
        names = [name for name in self.index.tensors if not name.startswith(other)]
        averaged = {name for name in names if _AVERAGE + name in self.index.tensors}
        self._stored = {name: _AVERAGE + name if name in averaged else name for name in names}
        self._by_inner_name = {inner_name(name): stored for name, stored in self._stored.items()}
        task = self.index.config.get("task", {}).get("name", "?")
        self.description = f"{path} (task {task}, step {self.index.step}, {len(averaged)} of {len(names)} averaged)"

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """See Source."""
        found = {}
        for name, stored in self._stored.items():
            tensor = self.index.tensors[stored]
            dtype = _DTYPES.get(tensor.dtype, torch.int64)
            wanted = shapes.get(inner_name(name))
            changes = wanted is not None and wanted != tensor.shape and dtype.is_floating_point
            value = torch.empty(tensor.shape, dtype=dtype, device="cpu" if changes else "meta")
            if changes:
                whole = Chunk((0,) * value.ndim, tuple(value.shape))
                load(self.index.path, [Piece(stored, tensor.shape, value.dtype, whole, value)])
            found[name] = value
        return found

    def fill(self, pieces: list[Piece]) -> None:
        """See Source."""
        renamed = [dataclasses.replace(p, name=self._by_inner_name[inner_name(p.name)]) for p in pieces]
        load(self.index.path, renamed, convert=True)

    def model_config(self) -> ModelConfig | None:
        """See Source."""
        model = self.index.config.get("model")
        return config_from_tree({"model": model}, source=str(self.index.path)).model if model else None


class OfficialFile:
    """An official .pth file, dense or with all experts; mapped into memory, so that a rank reads what it uses."""

    def __init__(self, path: Path, *, key: str) -> None:
        if not path.is_file():
            raise ValueError(f"{key}={path}: no such file")
        self.description = str(path)
        self._tensors = unwrap(read_torch_file(path, key=key))

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """See Source."""
        return self._tensors

    def fill(self, pieces: list[Piece]) -> None:
        """See Source. Nothing was on meta."""
        assert not pieces

    def model_config(self) -> ModelConfig | None:
        """See Source. Official files hold buffers that tell what matters (models/official.py)."""
        return None


def read_torch_file(path: Path, *, key: str) -> Any:
    """Returns the content of a torch file of plain tensors; its pickled config would be refused.

    Raises:
        ValueError: It holds anything else, or is no torch file.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds; all mean that the file is not plain tensors
        raise ValueError(f"{key}={path} cannot be read as plain tensors: {why_refused(error)}") from error


def why_refused(error: Exception) -> str:
    """Returns one clause for an error of torch or timm about a file; torch.load's own text advises to execute it."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+) was not an allowed", text):
        return f"it holds an object of {found[1]}; `swin-moe checkpoint convert` reads it without executing anything"
    if not text or "WeightsUnpickler error" in text:
        return "it is no file that torch.save wrote, or a damaged one"
    first, _, rest = text.partition("\n")
    if first.endswith(":"):  # a list of names follows
        return f"{first} {rest.strip().splitlines()[0][:_NAMES_SHOWN]}" if rest.strip() else first
    return first.split(". ")[0]


def load_weights(model: nn.Module, session: Session) -> str:
    """Fills the model from checkpoint.load, or from the newest checkpoint of the run; returns what was loaded.

    Averaged weights (EMA) are taken where the checkpoint has them.

    Raises:
        ValueError: Nothing to load, or the checkpoint does not fit the model.
    """
    source = session.config.checkpoint.load
    layout = parameter_layout(model, session.groups)
    pieces = [Piece(n, layout[n][0], p.dtype, layout[n][1], p.detach()) for n, p in model.named_parameters()]
    if is_torch_file(source):
        opened = OfficialFile(Path(source), key="checkpoint.load")
        report = fill_pieces(opened, pieces, backbone_of(model), {n: shape for n, (shape, _) in layout.items()})
        return f"{opened.description}: {report}"
    manager = CheckpointManager(session.directory / "checkpoints", group=session.groups.world)
    return manager.load_parameters(pieces, source=source)


def stored_classes(session: Session) -> tuple[str, ...]:
    """Returns the class names of the checkpoint that load_weights loads, in the order of outputs; () where it has none.

    Official files and checkpoints of older versions have none.
    """
    source = session.config.checkpoint.load
    if is_torch_file(source):
        return ()
    folder = session.directory / "checkpoints"
    path = find_checkpoint(source, key="checkpoint.load") if source else find_latest(folder)
    return () if path is None else tuple(Index.read(path).state.get("classes", ()))


def start_from(source: str, engine: Engine, session: Session) -> str:
    """Fills an engine's parameters, and their averages, with the weights of `source`; returns what became of them.

    Every rank calls it.

    Args:
        source: A checkpoint or run directory of any task, or an official .pth file.

    Raises:
        CheckpointError: On every rank: it cannot be read, or does not fit the network.
    """

    def fill() -> str:
        file = is_torch_file(source)
        opened = (
            OfficialFile(Path(source), key="checkpoint.init")
            if file
            else OwnCheckpoint(find_checkpoint(source, key="checkpoint.init"))
        )
        shapes = {name: shape for name, (shape, _) in engine.layout.items()}
        backbone = backbone_of(engine.local_model)
        report = fill_pieces(opened, engine.pieces(), backbone, shapes, own_parts=True)
        report.notes += window_notes(opened.model_config(), backbone)
        return f"{opened.description}: {report}"

    text = together(resolve(session.groups.world), fill)
    engine.load_state(engine.state())  # publishes the weights to wherever the engine has copies of them
    return text


def fill_pieces(
    source: Source,
    pieces: Iterable[Piece],
    backbone: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    own_parts: bool = False,
) -> LoadReport:
    """Returns the report of filling parameters and averages among `pieces`; changes nothing if something does not fit.

    Args:
        shapes: Global shapes of the network's parameters by name.
        own_parts: See fit_weights.
    """
    inner_shapes = {inner_name(name): tuple(shape) for name, shape in shapes.items()}
    values, report = fit_weights(backbone, source.tensors(inner_shapes), inner_shapes, own_parts=own_parts)
    direct = []
    for piece in pieces:
        name = piece.name.removeprefix(_AVERAGE)
        value = values.get(inner_name(name))
        if name not in shapes or value is None or not piece.chunk.numel:
            continue
        if value.is_meta:
            direct.append(dataclasses.replace(piece, name=name))
            continue
        box = tuple(slice(o, o + n) for o, n in zip(piece.chunk.offset, piece.chunk.size))
        with torch.no_grad():
            piece.tensor.copy_(value[box])
    source.fill(direct)
    return report


def window_notes(trained: ModelConfig | None, backbone: nn.Module) -> list[str]:
    """Returns a note where bias networks would be asked for other coordinates than they were trained for."""
    if trained is None or backbone.variant.bias != "log_cpb":
        return []
    windows = []
    for stage in range(len(trained.depths)):
        before = trained.pretrained_window_sizes[stage : stage + 1]
        windows.append((before and before[0]) or stage_geometry(trained, stage).window)
    asked = [stage.blocks[0].attn.pretrained_window for stage in backbone.layers]
    if asked == windows:
        return []
    return [
        f"the position biases were trained with windows {windows}, the model reads them with {asked}; set "
        f"model.pretrained_window_sizes={windows}, as the official fine-tuning configs do"
    ]


def backbone_of(model: nn.Module) -> nn.Module:
    """Returns the SwinTransformer in a task's network."""
    return getattr(model, "encoder", model)


def inner_name(name: str) -> str:
    """Returns a parameter's name in the backbone, or in a head; momentum networks have those of what they follow."""
    return name.removeprefix("momentum_").removeprefix("encoder.")


def is_torch_file(source: str) -> bool:
    """Returns whether a source is a file of torch's, by its name."""
    return source.endswith((".pth", ".pt"))

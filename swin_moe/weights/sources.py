"""Where weights come from: our checkpoints, and files of anyone else's that checkpoint_tools can read.

The content of a path decides what it is, never its name. A source gives named global tensors; a rank reads of them only
what it holds, except of tensors that have to be changed to fit.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from swin_moe.checkpoint import CheckpointError, Index, Piece, find_checkpoint, list_checkpoints, load
from swin_moe.checkpoint.index import FILE_NAME
from swin_moe.checkpoint.manager import to_raw, torch_dtype
from swin_moe.config import DataConfig, ModelConfig
from swin_moe.config.io import config_from_tree
from swin_moe.config.shipped.released import released
from swin_moe.layout import Chunk
from swin_moe.names.official import file_key, is_wrapped
from swin_moe.weights.fetch import fetch, place

_AVERAGE = "ema/"
# Momentum networks of MoBY follow the online ones, so a new run's begin where those do (fill_pieces).
_NO_WEIGHTS = ("optim.", "master/", "momentum_", _AVERAGE)
_READING = ("interpolation", "eval_crop", "resize", "exif")  # what of config.data makes an image a network's input
# What else a user can do who cannot fetch the weights of a recipe.
_WITHOUT = {"checkpoint.init": "; where that cannot be done, the config photos_from_scratch needs none"}
_TOLD = ("img_size", "window_size")  # what a network is, beside what its tensors tell


class Source(Protocol):
    """Named global tensors that are read in parts."""

    path: Path
    config: dict[str, Any]  # sections of Config as JSON, as far as it is known
    classes: tuple[str, ...]  # names in the order of outputs; () where unknown
    has_tables: bool  # whether coordinate tables among the tensors tell the windows of training
    notes: list[str]  # what a user should know of the source, in whole sentences; grows while it is read

    @property
    def description(self) -> str:
        """One clause: which checkpoint this is."""

    @property
    def names(self) -> Collection[str]:
        """Names of a network's tensors in it."""
        ...

    def tensors(self, shapes: Mapping[str, tuple[int, ...]], *, whole: Collection[str] = ()) -> dict[str, Tensor]:
        """Returns every tensor by name; one of the shape wanted may be on meta, and is then read by `fill`.

        Args:
            shapes: Global shapes wanted, by names.official.file_key.
            whole: Keys of tensors that are never left on meta.
        """

    def fill(self, pieces: list[Piece]) -> None:
        """Fills pieces, whose names are keys, from tensors that were on meta."""

    def model_config(self, **given: Any) -> ModelConfig | None:
        """Returns the network the weights were trained in; None where the source does not tell all of it.

        given: Fields of ModelConfig that count instead of the source's; of `moe` some.
        """

    def data_config(self) -> DataConfig:
        """Returns how its images were read; the defaults where the source does not tell."""


def is_own(path: Path) -> bool:
    """Returns whether a path is a checkpoint of this system, or a run or directory of such."""
    if not path.is_dir():
        return False
    return (path / FILE_NAME).exists() or bool(list_checkpoints(path / "checkpoints") or list_checkpoints(path))


def open_weights(source: str | Path, *, key: str) -> Source:
    """Returns the opened weights at a path: of this system, or of any format that checkpoint_tools reads.

    Args:
        source: A checkpoint or run directory of any task; an official, timm or transformers file; rank files by their
            path without ".rank0"; whatever else docs/formats.md lists; or the name of released weights on this disk.
        key: The option that `source` comes from, for errors.

    Raises:
        CheckpointError: It is none of them, or is refused; begins with `key`.
    """
    path = _path_of(source, key)
    if is_own(path):
        return OwnCheckpoint(find_checkpoint(path, key=key))
    try:
        return ForeignCheckpoint(path)
    except CheckpointError as error:
        text = str(error)
        raise type(error)(f"{key}={text if text.startswith(str(path)) else f'{path}: {text}'}") from None


def _path_of(source: str | Path, key: str) -> Path:
    """Returns the path of a source: itself, or where released weights of that name lie.

    Raises:
        TypeError, CheckpointError: It is no path, or of weights that are not on this disk; says how to get them.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{key} must be the path of weights, as text or a Path, got {source!r}")
    if not str(source).strip():
        raise CheckpointError(f"{key} must name a file or folder of weights, got {str(source)!r}")
    path = Path(source)
    row = released().get(str(source))
    if row is None or path.exists():
        return path
    if not place(row).is_file():
        otherwise = _WITHOUT.get(key, "")
        raise CheckpointError(
            f"{key}={source}: released weights that are not on this disk: swin-moe weights fetch {source}{otherwise}"
        )
    return fetch(row)


class _Stored:
    """What both kinds of source share: a config as JSON, and which stored tensor stands for which parameter."""

    path: Path
    config: dict[str, Any]
    notes: list[str]

    def _arrange(self, stored: Collection[str], *, start: str = "") -> None:
        """Notes which stored tensor stands for which parameter: its average where there is one.

        start: What has to stand before the source's names.
        """
        names = [name for name in stored if not name.startswith(_NO_WEIGHTS)]
        self._stored = {start + n: _AVERAGE + n if _AVERAGE + n in stored else n for n in names}
        wrapped = is_wrapped(self._stored)
        self._keys = {name: file_key(name, wrapped=wrapped) for name in self._stored}
        self._by_key = {key: self._stored[name] for name, key in self._keys.items()}

    @property
    def names(self) -> Collection[str]:
        """See Source."""
        return self._stored.keys()

    def _count_averages(self) -> str:
        averaged = sum(stored.startswith(_AVERAGE) for stored in self._stored.values())
        return f"{averaged} of {len(self._stored)} averaged"

    def model_config(self, **given: Any) -> ModelConfig | None:
        """See Source."""
        told = self.config.get("model", {})
        model = {**told, **given}
        if "moe" in told and isinstance(given.get("moe"), dict):
            model["moe"] = {**told["moe"], **given["moe"]}
        if not told or any(key not in model for key in _TOLD):
            return None
        return config_from_tree({"model": model}, source=str(self.path)).model

    def data_config(self) -> DataConfig:
        """See Source."""
        told = {key: value for key, value in self.config.get("data", {}).items() if key in _READING}
        return config_from_tree({"data": told}, source=str(self.path)).data


class OwnCheckpoint(_Stored):
    """A checkpoint of this system; averaged weights (EMA) are taken where it has them."""

    has_tables = False

    def __init__(self, path: Path) -> None:
        self.index = Index.read(path)
        self.path, self.config, self.notes = path, self.index.config, []
        self.classes = tuple(self.index.state.get("classes", ()))
        self._arrange(self.index.tensors)
        task = self.index.config.get("task", {}).get("name", "?")
        self.description = f"{path} (task {task}, step {self.index.step}, {self._count_averages()})"

    def tensors(self, shapes: Mapping[str, tuple[int, ...]], *, whole: Collection[str] = ()) -> dict[str, Tensor]:
        """See Source."""
        found = {}
        for name, stored in self._stored.items():
            tensor = self.index.tensors[stored]
            dtype = torch_dtype(tensor.dtype)
            key = self._keys[name]
            wanted = shapes.get(key)
            changes = wanted is not None and (wanted != tensor.shape or key in whole) and dtype.is_floating_point
            value = torch.empty(tensor.shape, dtype=dtype, device="cpu" if changes else "meta")
            if changes:
                load(self.index.path, [Piece.of(stored, value)])
            found[name] = value
        return found

    def fill(self, pieces: list[Piece]) -> None:
        """See Source."""
        renamed = [dataclasses.replace(piece, name=self._by_key[piece.name]) for piece in pieces]
        load(self.index.path, renamed, convert=True)


class ForeignCheckpoint(_Stored):
    """A checkpoint of another program, or of one of our exports, read by checkpoint_tools: safely, and in parts."""

    def __init__(self, path: Path) -> None:
        from checkpoint_tools.weights import open_weights as open_any
        from checkpoint_tools.weights import prefix_of, with_tables

        self.path, self.notes = path, []
        self._source = open_any(path, report=self._note)
        self.config = self._source.config
        names = self._source.state.get("classes")
        self.classes = tuple(names) if isinstance(names, list) else ()
        self._with_tables = with_tables(self._source)
        self.has_tables = self._with_tables is not None
        self._arrange(self._source.tensors, start=prefix_of(self._source))

    def _note(self, sentence: str) -> None:
        self.notes.append(sentence.removeprefix(f"{self.path}: "))

    @property
    def description(self) -> str:
        """See Source."""
        averages = self._count_averages()
        return self._source.described if averages.startswith("0 ") else f"{self._source.described}, {averages}"

    def tensors(self, shapes: Mapping[str, tuple[int, ...]], *, whole: Collection[str] = ()) -> dict[str, Tensor]:
        """See Source. A second bias of experts that is not trained is read, as it may hold numbers all the same."""
        found = {}
        for name, stored in self._stored.items():
            tensor = self._source.tensors[stored]
            key = self._keys[name]
            fits = shapes.get(key) == tensor.shape and key not in whole and not name.endswith(".experts.fc2_bias")
            value = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device="meta" if fits else "cpu")
            if not fits:
                self._source.read(stored, Chunk.whole(tensor.shape), to_raw(value))
            found[name] = value
        if self._with_tables is not None:
            for name, leaf in self._with_tables.tables.items():
                table = torch.empty(leaf.record.shape, dtype=torch_dtype(leaf.record.dtype))
                to_raw(table)[...] = self._with_tables.read_table(name)
                found[name] = table
        return found

    def fill(self, pieces: list[Piece]) -> None:
        """See Source."""
        wanted = [(piece, self._by_key[piece.name]) for piece in pieces]
        for piece, stored in sorted(wanted, key=lambda item: self._source.locate(item[1], item[0].chunk)):
            dtype, tensor = torch_dtype(self._source.tensors[stored].dtype), piece.tensor
            direct = tensor.dtype == dtype and tensor.device.type == "cpu"
            host = tensor if direct else torch.empty(piece.chunk.size, dtype=dtype)
            self._source.read(stored, piece.chunk, to_raw(host))
            if not direct:
                with torch.no_grad():
                    tensor.copy_(host)

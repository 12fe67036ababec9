"""Weights from elsewhere: to evaluate and predict with, or for a new run to begin with.

A source is a checkpoint of this system, of any task and in any layout, or whatever else checkpoint_tools reads
(sources.py). Every rank reads only what it holds, except of tensors that have to be changed to fit (bias tables
of another window, class heads).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swin_moe.checkpoint import CheckpointManager, Piece, find_checkpoint, find_latest, resolve, together
from swin_moe.config import Config, ModelConfig
from swin_moe.config.mistaken import is_run
from swin_moe.engine.base import Engine
from swin_moe.models.attention import stage_geometry
from swin_moe.models.network import Network
from swin_moe.models.official import LoadReport, fit_weights
from swin_moe.models.swin import SwinTransformer
from swin_moe.names.official import file_key, is_wrapped
from swin_moe.parallel.apply import parameter_layout
from swin_moe.registry import lookup
from swin_moe.run.session import Session
from swin_moe.tasks.base import TASKS
from swin_moe.weights.sources import ForeignCheckpoint, OwnCheckpoint, Source, is_own, open_weights

_AVERAGE = "ema/"
_SHAPING = ("embed_dim", "depths", "num_heads")  # options of a model that nearly all of its tensors depend on
_NAMES_SHOWN = 160  # characters


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


def load_weights(model: Network, session: Session, stored: Source | None = None) -> str:
    """Fills the model from checkpoint.load, or from the newest checkpoint of the run; returns what was loaded.

    Averaged weights (EMA) are taken where the checkpoint has them.

    Args:
        stored: What open_stored returned, if the caller has it already.

    Raises:
        ValueError: Nothing to load, or the checkpoint does not fit the model.
    """
    source = session.config.checkpoint.load
    layout = parameter_layout(model, session.groups)
    pieces = [Piece(n, layout[n][0], p.dtype, layout[n][1], p.detach()) for n, p in model.named_parameters()]
    if source and not is_own(Path(source)):
        shapes = {n: shape for n, (shape, _) in layout.items()}

        def fill() -> str:
            opened = open_weights(source, key="checkpoint.load") if stored is None else stored
            pairs = model.momentum_pairs()
            followed = {} if pairs.keys() & opened.names else pairs  # a file may hold a teacher of its own
            report = fill_pieces(opened, pieces, backbone_of(model), shapes, followed=followed, same_classes=True)
            return f"{opened.description}: {report}"

        return together(resolve(session.groups.world), fill)
    stored = open_stored(session) if stored is None else stored
    if stored is not None:
        _check_positions(stored, backbone_of(model))
        _check_followers(stored, model)
    folder = session.directory / "checkpoints"
    return CheckpointManager(folder, group=session.groups.world).load_parameters(pieces, source=source)


def _check_positions(stored: Source, backbone: SwinTransformer) -> None:
    """Raises ValueError where absolute positions are as many as the model's, but of an image of another shape."""
    trained = stored.model_config()
    if trained is None or not trained.ape or not hasattr(backbone, "absolute_pos_embed"):
        return
    there, here = stage_geometry(trained, 0).resolution, backbone.grid
    if there != here and math.prod(there) == math.prod(here):
        height, width = trained.img_size
        raise ValueError(
            f"{stored.path}: its absolute positions are of {there[0]} x {there[1]} tokens, the model has {here[0]} x "
            f"{here[1]}; set model.img_size=[{height},{width}]"
        )


def _check_followers(stored: Source, model: Network) -> None:
    """Raises ValueError where a checkpoint of this system has nothing of the model's momentum network, or teacher."""
    pairs = model.momentum_pairs()
    if pairs and isinstance(stored, OwnCheckpoint) and not pairs.keys() & stored.index.tensors.keys():
        task, part = stored.config.get("task", {}).get("name", "?"), next(iter(pairs)).partition(".")[0]
        raise ValueError(
            f"{stored.path}: holds no {part}, as task {task} trains none; use task.name={task}, or begin a run with it "
            f"(checkpoint.init)"
        )


def open_stored(session: Session) -> Source | None:
    """Returns the checkpoint that load_weights loads, opened; None where the run has none yet."""
    path = session.config.checkpoint.load or find_latest(session.directory / "checkpoints")
    if path is None:
        return None
    stored = open_weights(path, key="checkpoint.load")
    if session.config.checkpoint.load and isinstance(stored, OwnCheckpoint):
        _check_kind(stored, session.config)
    return stored


def _check_kind(stored: OwnCheckpoint, config: Config) -> None:
    """Raises ValueError where a checkpoint of this system is of another task or network; says where to find its own."""
    told, here = stored.config.get("task", {}).get("name", ""), config.task.name
    other = ""
    if told in TASKS and _looks_for(told) != _looks_for(here):
        other = f"was trained with task.name={told}, not {here}"
    elif told in TASKS:
        other = other_network(stored.config.get("model", {}), config.model)
    if other:
        run = stored.path.parent.parent
        its = run if is_run(run) else "the run that it is of"
        raise ValueError(
            f"checkpoint.load={stored.path}: {other}; name {its} in the place of the config, or begin a run of this "
            f"one with what fits of it (checkpoint.init)"
        )


def _looks_for(name: str) -> tuple[bool, bool]:
    """Returns whether a task's network finds objects, and whether it finds a class per pixel: parts no other has."""
    task = lookup(TASKS, name, key="task.name")
    return task.needs_boxes, task.needs_label_maps


def other_network(told: Mapping[str, Any], model: ModelConfig) -> str:
    """Returns in words what makes a network another than the model's, of which no tensor would fit; "" = nothing.

    told: Its options as JSON, as far as they are known.
    """
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(model).items()}
    differ = [key for key in _SHAPING if key in told and told[key] != own[key]]
    if not differ:
        return ""
    theirs, ours = (", ".join(f"model.{key}={tree[key]}" for key in differ).replace(" ", "") for tree in (told, own))
    return f"is of another network: {theirs}, not {ours}".replace(",model", ", model")


def check_sources(session: Session) -> None:
    """Raises where training would find, after building its network, that it cannot read what that begins with.

    Rank 0 looks, before anything is allocated: at task.distill.teacher, and at checkpoint.load, or checkpoint.init of a
    run without checkpoints.

    Raises:
        CheckpointError: On every rank: it is not there, or is no checkpoint or file of weights.
    """
    config = session.config
    told = config.checkpoint

    def look() -> None:
        if config.task.name == "distill" and not config.task.distill.teacher_model.startswith("timm:"):
            open_weights(config.task.distill.teacher, key="task.distill.teacher")
        if told.load:
            find_checkpoint(told.load, key="checkpoint.load")
        elif told.init and find_latest(session.directory / "checkpoints") is None:
            open_weights(told.init, key="checkpoint.init")

    together(resolve(session.groups.world), look if session.rank == 0 else lambda: None)


def start_from(source: str, engine: Engine, session: Session) -> str:
    """Fills an engine's parameters, and their averages, with the weights of `source`; returns what became of them.

    Every rank calls it.

    Args:
        source: See sources.open_weights.

    Raises:
        CheckpointError: On every rank: it cannot be read, or does not fit the network.
    """

    def fill() -> str:
        opened = open_weights(source, key="checkpoint.init")
        shapes = {name: shape for name, (shape, _) in engine.layout.items()}
        model = engine.local_model
        followed = model.momentum_pairs()
        report = fill_pieces(opened, engine.pieces(), backbone_of(model), shapes, followed=followed, own_parts=True)
        return f"{opened.description}: {report}"

    text = together(resolve(session.groups.world), fill)
    engine.load_state(engine.state())  # publishes the weights to wherever the engine has copies of them
    return text


def fill_pieces(
    source: Source,
    pieces: Iterable[Piece],
    backbone: SwinTransformer,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    followed: Mapping[str, str] | None = None,
    own_parts: bool = False,
    same_classes: bool = False,
) -> LoadReport:
    """Returns the report of filling parameters and averages among `pieces`; changes nothing if something does not fit.

    Args:
        shapes: Global shapes of the network's parameters by name.
        followed: Network.momentum_pairs of the network; those parameters get what the ones they follow get.
        own_parts, same_classes: See fit_weights.
    """
    wrapped, trained = is_wrapped(shapes), source.model_config()
    online = dict(followed or {})
    keys = {name: file_key(online.get(name, name), wrapped=wrapped) for name in shapes}
    key_shapes = {keys[name]: tuple(shape) for name, shape in shapes.items()}
    grid = trained_grid(source, backbone)
    other_map = grid not in (None, backbone.grid)  # as many positions of another image have another order
    tensors = source.tensors(key_shapes, whole=("absolute_pos_embed",) if other_map else ())
    try:
        values, report = fit_weights(
            backbone, tensors, key_shapes, own_parts=own_parts, same_classes=same_classes, grid=grid
        )
    except ValueError as error:
        if other := other_network(source.config.get("model", {}), backbone.config):
            raise ValueError(
                f"{source.description}: weights do not fit the model: the file {other}; a config of its network takes "
                f"it: `swin-moe configs WORD ...` lists them"
            ) from None
        raise ValueError(f"{source.description}: {error}") from None
    direct = []
    for piece in pieces:
        name = piece.name.removeprefix(_AVERAGE)
        value = values.get(keys.get(name, ""))
        if value is None or not piece.chunk.numel:
            continue
        if value.is_meta:
            direct.append(dataclasses.replace(piece, name=keys[name]))
            continue
        box = tuple(slice(o, o + n) for o, n in zip(piece.chunk.offset, piece.chunk.size))
        with torch.no_grad():
            piece.tensor.copy_(value[box])
    source.fill(direct)
    report.notes += source.notes
    if not source.has_tables:
        report.notes += window_notes(trained, backbone)
    return report


def trained_grid(source: Source, backbone: SwinTransformer) -> tuple[int, int] | None:
    """Returns height and width in tokens of a source's absolute positions; None where nothing tells.

    Of another program's file without options of its own, a square of as many tokens as the network has is a guess from
    their number.
    """
    trained = source.model_config()
    if trained is None:
        return None
    here, there = backbone.grid, stage_geometry(trained, 0).resolution
    guessed = isinstance(source, ForeignCheckpoint) and source.config.keys() == {"model"} and there[0] == there[1]
    return None if guessed and there != here and math.prod(there) == math.prod(here) else there


def window_notes(trained: ModelConfig | None, backbone: SwinTransformer) -> list[str]:
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


def backbone_of(model: nn.Module) -> SwinTransformer:
    """Returns the encoder or backbone in a task's network, or the network itself."""
    # A task's network may be anyone's.
    backbone: Any = getattr(model, "encoder", None) or getattr(model, "backbone", model)
    return backbone

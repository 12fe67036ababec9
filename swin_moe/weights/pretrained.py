"""Networks with their weights, for a user's own Python: one's own runs, official files, whatever can be converted."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from swin_moe.checkpoint import Piece
from swin_moe.config import DataConfig
from swin_moe.config.shipped.released import of_config, released
from swin_moe.data.pixels import decode, read_image, to_rgb
from swin_moe.data.transforms import build_transform
from swin_moe.models import build
from swin_moe.models.official import LoadReport
from swin_moe.models.official import load_official as load_state_dict
from swin_moe.models.swin import SwinTransformer
from swin_moe.names.official import is_dense_task
from swin_moe.weights.fetch import Progress, fetch
from swin_moe.weights.load import fill_pieces, trained_grid
from swin_moe.weights.sources import Source, open_weights

_log = logging.getLogger(__name__)
Preprocess = Callable[[str | Path | Image.Image], Tensor]


class Loaded(NamedTuple):
    """A trained network and what belongs to it."""

    model: SwinTransformer  # on the CPU, in eval mode
    classes: tuple[str, ...]  # names in the order of outputs; () where the file has none
    preprocess: Preprocess  # a file or image -> (3, H, W) float32, as the evaluation of the run makes its input


def load(path: str | Path, **overrides: Any) -> Loaded:
    """Returns the network at a path with its class names and preprocessing; averaged weights (EMA) where it has them.

    Args:
        path: A run directory (its newest checkpoint), a checkpoint, what `checkpoint export --to safetensors` wrote, or
            any file or folder that `checkpoint convert` reads; rank files by their path without ".rank0".
        overrides: Fields of ModelConfig, for what the source does not tell (img_size of a timm file) or to read it
            otherwise (img_size=384, attention="reference"); moe={...} gives some of MoEConfig's.

    Raises:
        ValueError: It is no checkpoint, of no classifier, does not tell its network, or does not fit it.
    """
    source = open_weights(path, key="path")
    told = source.config.get("model", {})
    if is_dense_task(source.names):
        raise ValueError(
            f"{path}: holds a detector or segmentor, and swin_moe.load gives classifiers; for its objects or label "
            f"maps: swin-moe predict; its backbone alone: swin_moe.create_model(name, pretrained=path)"
        )
    if not told.get("name"):
        raise ValueError(f"{path}: does not tell its network; name it: swin_moe.create_model(name, pretrained=path)")
    missing = [f"{key}=..." for key in ("img_size", "window_size") if key not in told and key not in overrides]
    moe = {**told.get("moe", {}), **overrides.get("moe", {})}
    missing += ["moe={'top_k': ...}"] if "num_experts" in moe and "top_k" not in moe else []
    if missing:
        raise ValueError(f"{path}: does not tell all of its network; give swin_moe.load(path, {', '.join(missing)})")
    config = source.model_config(**overrides)
    assert config is not None, "nothing that it needs is missing"
    with torch.device("meta"):
        model = build.build_model(config)
    model.to_empty(device="cpu")
    model.init_weights(0)
    report = _fill(model, source)
    _tell(path, report)
    model.classes, model.reading = source.classes, source.data_config()
    return Loaded(model.eval(), source.classes, preprocess_of(model.reading, config.img_size))


def create_model(name: str | Path, *, pretrained: str | Path | bool = "", **overrides: Any) -> SwinTransformer:
    """Returns a network by name; see models.build.create_model.

    Args:
        pretrained: Weights to begin with, by the rules of checkpoint.init: a checkpoint or run of this system, any file
            that `checkpoint convert` reads, the name of released weights (`swin-moe weights list`), or True for those
            that were released for the config `name`. Released ones are fetched once (weights/fetch.py). What does not
            fit and why is logged.

    Raises:
        ValueError: Unknown name or override, a value out of range, weights that do not fit or cannot be fetched.
    """
    model = build.create_model(name, **overrides)
    if not pretrained:
        return model
    if next(model.parameters()).is_meta:
        raise ValueError("create_model: pretrained needs real parameters, and the default device is meta")
    path = _fetched(name, pretrained)
    source = open_weights(path, key="pretrained")
    _tell(path, _fill(model, source, own_parts=True))
    return model


def _fetched(name: str | Path, pretrained: str | Path | bool) -> str | Path:
    """Returns the path of weights: as it is given, or of released ones that are fetched where they are not there."""
    if isinstance(pretrained, bool):
        row = of_config(Path(name).stem)
    elif str(pretrained) in released() and not Path(pretrained).exists():
        row = released()[str(pretrained)]
    else:
        return pretrained
    return fetch(row, show=Progress(row.name))


def load_official(
    model: SwinTransformer,
    state_dict: Mapping[str, Any] | str | Path,
    strict: bool = True,
    *,
    interpolation: Literal["bicubic", "geometric"] | None = None,
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Returns the report of loading official weights; see models.official.load_official.

    Args:
        state_dict: What torch.load gave, or the path of a file, which is read without executing anything, and whose
            config, where it has one, tells `grid`.
    """
    if isinstance(state_dict, Mapping):
        return load_state_dict(model, state_dict, strict, interpolation=interpolation, grid=grid)
    if not isinstance(state_dict, str | Path):
        raise TypeError(f"load_official(model, state_dict) takes tensors or a path, got a {type(state_dict).__name__}")
    source = open_weights(state_dict, key="state_dict")
    grid = trained_grid(source, model) if grid is None else grid
    report = load_state_dict(model, source.tensors({}), strict, interpolation=interpolation, grid=grid)
    report.notes += source.notes
    return report


def _fill(model: SwinTransformer, source: Source, *, own_parts: bool = False) -> LoadReport:
    pieces = [Piece.of(name, p.detach()) for name, p in model.named_parameters()]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return fill_pieces(source, pieces, model, shapes, own_parts=own_parts, same_classes=not own_parts)


def _tell(path: str | Path, report: LoadReport) -> None:
    """Logs what became of the weights; as a warning where something is not as it was in the file."""
    changed = report.interpolated or report.reinitialized or report.notes
    _log.log(logging.WARNING if changed else logging.INFO, "%s: %s", path, report)


def preprocess_of(config: DataConfig, img_size: tuple[int, int]) -> Preprocess:
    """Returns what makes a file or image the input of a network, as evaluation with that `data` does."""
    transform = build_transform(config, img_size, train=False)

    def preprocess(image: str | Path | Image.Image) -> Tensor:
        if isinstance(image, Image.Image):
            return transform(to_rgb(ImageOps.exif_transpose(image) if config.exif else image), 0)
        return transform(decode(read_image(image), str(image), exif=config.exif), 0)

    return preprocess

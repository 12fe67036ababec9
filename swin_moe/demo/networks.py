"""Networks that the page looks at: those that classify, and those of tasks that find things in an image.

Shape legend: C channels, H, W rows and columns of a stage's map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from swin_moe.config.io import config_files
from swin_moe.config.shipped.released import released
from swin_moe.data.batch import to_device
from swin_moe.data.pixels import to_rgb
from swin_moe.data.transforms import to_rgb as shown
from swin_moe.engine.precision import autocast
from swin_moe.models.swin import SwinTransformer
from swin_moe.predict.command import with_classes
from swin_moe.predict.pixels import batch_of
from swin_moe.run.session import Session, build_classifier, build_local_model, open_session
from swin_moe.tasks.base import StepContext, build_task
from swin_moe.tasks.dense import Found, LooksAtImages
from swin_moe.tasks.drawing import pixels_of
from swin_moe.weights.fetch import Progress, fetch
from swin_moe.weights.load import backbone_of, load_weights
from swin_moe.weights.pretrained import Loaded, load, preprocess_of
from swin_moe.weights.sources import OwnCheckpoint, open_weights


@dataclass(frozen=True)
class Said:
    """What a network says of one image."""

    pixels: np.ndarray  # (height, width, 3) uint8, what its backbone saw (last, if it looked more than once)
    maps: list[Tensor]  # (C, H, W) of every stage, of these pixels
    classes: list[tuple[str, float]]  # name and probability, the likeliest first; [] where it finds things
    found: Found | None = None  # in `stored`
    stored: np.ndarray | None = None  # (height, width, 3) uint8, the whole image


class Shown(Protocol):
    """A network that the page can look at."""

    names: Sequence[str]  # of its classes
    backbone: SwinTransformer  # what is watched while it says something
    finds: bool  # objects or pixels of an image; or it classifies whole ones

    def say(self, image: Any, *, top: int) -> Said:
        """Returns what it says of an image of Pillow's or a path, with so many classes at most."""


class Classifier:
    """A network that classifies images."""

    finds = False

    def __init__(self, loaded: Loaded) -> None:
        self.names: Sequence[str] = loaded.classes
        self.backbone, self.preprocess = loaded.model, loaded.preprocess

    def say(self, image: Any, *, top: int) -> Said:
        """See Shown."""
        pixels = self.preprocess(image)
        output = self.backbone(pixels[None])
        logits = output[0] if isinstance(output, tuple) else output
        probability = logits[0].double().softmax(dim=-1)
        best = probability.topk(min(top, len(probability)))
        maps = self.backbone.forward_features(pixels[None])
        classes = [(self._name(int(k)), float(p)) for p, k in zip(best.values, best.indices)]
        return Said(shown(pixels), [m[0] for m in maps], classes)

    def _name(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else f"class {number}"


class Finder:
    """A detector or segmentor: what `swin-moe predict` draws, and what its backbone made of the image."""

    finds = True

    def __init__(self, session: Session, task: LooksAtImages, model: nn.Module, names: Sequence[str]) -> None:
        self.names, self._session, self._task, self._model = names, session, task, model
        self.backbone = backbone_of(getattr(model, "teacher", model))  # Soft Teacher looks with its teacher

    def say(self, image: Any, *, top: int) -> Said:
        """See Shown; `top` is of classifiers."""
        config, device = self._session.config, self._session.device
        given = image if isinstance(image, Image.Image) else Image.open(image)
        stored = to_rgb(ImageOps.exif_transpose(given) if config.data.exif else given)
        batch = to_device(batch_of(config, stored, 1), device, config.engine.precision)
        context = StepContext(config, 0, 1, 0, lambda: autocast(config.engine.precision, device))
        seen: list[tuple[Tensor, list[Tensor]]] = [(batch["image"], [])]

        def keep(_: nn.Module, arguments: tuple, options: dict, output: Any) -> None:
            seen[0] = (arguments[0] if arguments else options["x"], output.maps)

        handle = self.backbone.register_forward_hook(keep, with_kwargs=True)
        try:
            (found,) = self._task.look(self._model, batch, context)
        finally:
            handle.remove()
        pixels, maps = seen[0]
        return Said(pixels_of(pixels[0]), [m[0] for m in maps], [], found, np.asarray(stored))


def open_network(source: str, overrides: Sequence[str] = ()) -> Shown:
    """Returns a network to look at.

    Args:
        source: A run, a checkpoint, a file of weights that tells its network, released weights by name; or a config,
            whose weights are those of its run, or `checkpoint.load` among the overrides.

    Raises:
        ValueError: It is none of them, or a network that neither classifies nor finds things in images.
    """
    row = None if Path(source).exists() else released().get(source)
    if overrides or (row is None and source in {path.stem for path in config_files()}) or _is_config(source):
        return _of_session(source, list(overrides))
    if row is not None:
        if not row.config:
            raise ValueError(f"{source}: released weights that no config of ours is for; swin-moe weights list has all")
        fetch(row, show=Progress(row.name))
        return _of_session(row.config, [f"checkpoint.load={source}"])
    stored = open_weights(source, key="RUN")
    if isinstance(stored, OwnCheckpoint) and stored.config.get("task", {}).get("name", "classify") != "classify":
        return _of_session(str(_run_of(stored.path)), [f"checkpoint.load={source}"])
    if stored.model_config() is None:
        raise ValueError(
            f"{source}: does not tell all of its network; name its config: "
            f"swin-moe demo CONFIG checkpoint.load={source}"
        )
    loaded = load(source)
    if not loaded.model.config.num_classes:
        raise ValueError(f"{source}: the network has no classes to show; the demo is for networks that say something")
    return Classifier(loaded)


def _is_config(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml") and Path(source).is_file()


def _run_of(checkpoint: Path) -> Path:
    """Returns the folder of the run that wrote a checkpoint, whose config.yaml has its task.

    Raises:
        ValueError: The checkpoint stands alone.
    """
    run = checkpoint.parent.parent
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{checkpoint}: stands without its run, whose config.yaml has the task; "
            f"give both: swin-moe demo CONFIG checkpoint.load={checkpoint}"
        )
    return run


def _of_session(config: str, overrides: list[str]) -> Shown:
    """Returns the network of a config with the weights that `swin-moe predict` would take."""
    session = open_session(config, overrides)
    task = build_task(session.config)
    looks = isinstance(task, LooksAtImages)
    if not looks and not session.config.task.options.classifies:
        raise ValueError(
            f"{config}: a network of task.name={session.config.task.name} says nothing of an image that could be shown"
        )
    session, stored, names = with_classes(session)
    task = build_task(session.config)  # of as many classes as the checkpoint
    model = build_local_model(session, task) if looks else build_classifier(session)
    print(f"weights: {load_weights(model, session, stored)}", flush=True)
    model.eval()
    if isinstance(task, LooksAtImages):
        return Finder(session, task, model, names)
    data, img_size = session.config.data, session.config.model.img_size
    assert isinstance(model, SwinTransformer)
    return Classifier(Loaded(model.to(torch.float32), tuple(names), preprocess_of(data, img_size)))

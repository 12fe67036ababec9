"""What a run's network does on its validation images: confusions, accuracy by class, best and worst, routing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swin_moe.data.batch import Batch, to_device
from swin_moe.data.loader import EvalLoader
from swin_moe.engine.precision import autocast
from swin_moe.inspect_routing import RoutingRecorder
from swin_moe.models import Network
from swin_moe.run.routing_pictures import PatchMap
from swin_moe.run.session import Session, build_classifier, open_session
from swin_moe.weights.load import load_weights, open_stored

_SHOWN = 8  # best images, and worst


@dataclass
class Seen:
    """One validation image and what the network said of it."""

    image: Tensor  # (3, H, W), as the network saw it
    label: int
    said: int  # the most likely class
    probability: float  # of `label`


@dataclass
class Results:
    """What was found out."""

    classes: tuple[str, ...]
    counts: np.ndarray  # (K, K) int64: images of class k that were called j
    images: int  # that were looked at
    total: int  # that there are
    weights: str  # which
    best: list[Seen] = field(default_factory=list)  # most certain and right
    worst: list[Seen] = field(default_factory=list)  # least probability of what they are
    routed: list[tuple[Seen, list[PatchMap]]] = field(default_factory=list)
    num_experts: int = 0

    @property
    def accuracy(self) -> np.ndarray:
        """Returns the share of images of each class that were called it, (K,) in per cent; NaN without images."""
        sums = self.counts.sum(axis=1)
        return np.where(sums > 0, 100 * np.diag(self.counts) / np.maximum(sums, 1), np.nan)

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """Returns (images, class, what they were called) of the most frequent confusions."""
        wrong = self.counts * (1 - np.eye(len(self.counts), dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        size = len(wrong)
        return [(int(wrong.flat[i]), int(i) // size, int(i) % size) for i in order if wrong.flat[i]]


def look(directory: Path, most: int, overrides: Sequence[str] = ()) -> Results:
    """Returns what the newest checkpoint of a run does on up to `most` validation images, spread over the set.

    Raises:
        ValueError: The run is of a task without classes, has no checkpoint, or its data are not there.
    """
    words = [f"checkpoint.load={directory}", *overrides]
    session = open_session(str(directory / "config.yaml"), words)
    model = build_classifier(session)
    stored = open_stored(session)
    weights = load_weights(model, session, stored)
    config = session.config
    loader = _loader(session, () if stored is None else stored.classes, most)
    names = tuple(loader.dataset.classes)
    classes = names + tuple(map(str, range(len(names), config.model.num_classes)))
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    found = Results(classes, counts, 0, len(loader.dataset), weights)
    for seen in _seen(model.eval(), loader, session):
        counts[seen.label, seen.said] += 1
        found.images += 1
        _keep(found.worst, seen, lambda one: one.probability)
        if seen.said == seen.label:
            _keep(found.best, seen, lambda one: -one.probability)
    _route(found, model, session)
    return found


def _loader(session: Session, names: tuple[str, ...], most: int) -> EvalLoader:
    """Returns the loader of every n-th validation image, so of all classes of a set that is sorted by class."""
    config = session.config

    def loader(every: int) -> EvalLoader:
        batch = min(config.data.eval_batch or config.accumulation(1)[0], 64)
        return EvalLoader(
            config.data,
            config.model.img_size,
            rank=0,
            world_size=every,
            batch=batch,
            num_classes=config.model.num_classes,
            classes=names,
        )

    whole = loader(1)
    return whole if len(whole.dataset) <= most else loader(-(-len(whole.dataset) // most))


@torch.inference_mode()
def _seen(model: Network, loader: EvalLoader, session: Session) -> Iterator[Seen]:
    precision = session.config.engine.precision
    for item in loader:
        batch: Batch = to_device(item, session.device, precision)
        if not len(batch["image"]):
            continue
        probabilities = _forward(model, batch["image"], session).float().softmax(1).cpu()
        for pixels, label, row in zip(item["image"], batch["target"].tolist(), probabilities):
            yield Seen(pixels, label, int(row.argmax()), float(row[label]))


def _forward(model: Network, image: Tensor, session: Session) -> Tensor:
    with autocast(session.config.engine.precision, session.device):
        output = model(image.to(next(model.parameters()).dtype))
    return output[0] if isinstance(output, tuple) else output


def _keep(kept: list[Seen], seen: Seen, rank: Callable[[Seen], float]) -> None:
    """Keeps the first _SHOWN by rank; of equals those that came first."""
    kept.append(seen)
    kept.sort(key=rank)
    del kept[_SHOWN:]


@torch.inference_mode()
def _route(found: Results, model: Network, session: Session) -> None:
    """Adds where the patches of some images went, of a network with MoE layers."""
    recorder = RoutingRecorder(model)
    if not recorder.blocks:
        return
    found.num_experts = recorder.num_experts
    with recorder.recording():
        for seen in [*found.best[:1], *found.worst[:1]]:
            _forward(model, seen.image[None].to(session.device), session)
            found.routed.append((seen, recorder.patch_maps(0)))

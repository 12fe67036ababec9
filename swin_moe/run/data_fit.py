"""Whether a configuration fits the images it is given: as many outputs as there are classes, images large enough."""

import logging
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from swin_moe.checkpoint import resolve, together
from swin_moe.data.base import Listed
from swin_moe.data.datasets import FileDataset, build_dataset
from swin_moe.data.pixels import BrokenImage
from swin_moe.run.session import Session

_log = logging.getLogger(__name__)
_LOOKED_AT = 32  # images, spread evenly over the listing


def with_counted_classes(session: Session) -> Session:
    """Returns the session with model.num_classes as the training data has classes, where data.count_classes asks it.

    Raises:
        ValueError: The data cannot be listed, on every rank.
    """
    config = session.config
    if not (config.data.count_classes and config.task.options.classifies):
        return session

    def count() -> int:
        size, outputs = config.model.img_size, config.model.num_classes
        return build_dataset(config.data, "train", img_size=size, num_classes=outputs).num_classes

    counted = together(resolve(session.groups.world), count)
    if counted == config.model.num_classes:
        return session
    _log.info("model.num_classes=%d, the classes of data.path=%s (data.count_classes)", counted, config.data.path)
    return replace(session, config=replace(config, model=replace(config.model, num_classes=counted)))


def warn_of_small_images(session: Session, train: Listed) -> None:
    """Warns, on rank 0, where most training images are smaller than the network's: enlarging them adds no detail.

    Looks at a few of them, of data sets whose images are files.
    """
    height, width = session.config.model.img_size
    if session.rank or not isinstance(train, FileDataset):
        return
    places = np.unique(np.linspace(0, len(train) - 1, _LOOKED_AT).round().astype(int))
    sizes = list(_sizes(train, places))
    small = [size for size in sizes if size[0] < width or size[1] < height]
    if len(small) > len(sizes) / 2:
        shorter = int(np.median([min(size) for size in sizes]))
        _log.warning(
            "model.img_size=[%d, %d], but %d of %d training images looked at are smaller (shorter side %d in the "
            "middle): they are enlarged, which costs time and adds no detail",
            height,
            width,
            len(small),
            len(sizes),
            shorter,
        )


def _sizes(dataset: FileDataset, places: Iterable[int]) -> Iterable[tuple[int, int]]:
    for place in places:
        try:
            image, _ = dataset.sample(int(place))
        except BrokenImage:  # training says so when it meets it
            continue
        yield image.size

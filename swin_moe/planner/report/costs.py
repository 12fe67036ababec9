"""What a whole training run of a layout needs: days, energy, price; and how large and how slow its checkpoints are."""

import math
from dataclasses import dataclass

from swin_moe.config import Config
from swin_moe.data.datasets import build_dataset
from swin_moe.data.loader import steps_in_epoch
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.plan import Planned
from swin_moe.planner.workload import Workload, moments_of, weight_dtype

# Training images of what the configs of a data set without a path here are written for, by number of classes.
# Training images by classes: those of COCO 2017 that have an object, and ADE20K.
_DENSE = {("coco", 80): 117_266, ("label_maps", 150): 20_210}
_IMAGENET = {
    1000: 1_281_167,
    21841: 14_197_122,
    21842: 14_197_122,
}  # image-net.org: ILSVRC 2012, and the winter of 2021


@dataclass(frozen=True)
class Costs:
    """Of the schedule optim.epochs; steps alone, without evaluation. None where the images of an epoch are unknown."""

    epochs: float
    images_per_epoch: int | None
    steps: int | None
    days: float | None
    energy_kwh: float | None  # of all ranks
    price_dollars: float | None  # of all ranks
    checkpoint_bytes: float  # of all files together
    save_seconds: float  # every node writes its share
    reshard_seconds: float  # one node reads and writes all of it


def predict_costs(config: Config, hardware: Hardware, workload: Workload, planned: Planned, images: int) -> Costs:
    """Returns the costs of a layout. images: Training images of an epoch; 0 = what is known of the data set."""
    per_epoch = images or images_of(config)
    world = planned.layout.world_size
    steps = days = energy = price = None
    each = steps_in_epoch(per_epoch or 0, config.data.global_batch, drop_last=config.data.drop_last)
    if each:  # else training refuses so few images
        steps = round(config.optim.epochs * each)
        hours = steps * planned.time.seconds / 3600
        days, energy, price = hours / 24, hours * hardware.watts * world / 1000, hours * hardware.price_per_hour * world
    size = checkpoint_bytes(config, workload)
    nodes = math.ceil(world / hardware.ranks_per_node)
    disk = hardware.disk_bytes_per_second
    return Costs(
        config.optim.epochs, per_epoch, steps, days, energy, price, size, size / (nodes * disk), 2 * size / disk
    )


def checkpoint_bytes(config: Config, workload: Workload) -> float:
    """Returns the bytes of a checkpoint's tensors: weights, moments of what is trained, averages; each once."""
    item = weight_dtype(config).itemsize
    moments = moments_of(config.optim)
    copies = 1 + (config.optim.ema > 0)
    return float(item * (copies * workload.numel() + moments * workload.numel(trained=True)))


def images_of(config: Config) -> int | None:
    """Returns the training images of an epoch, None where only the data on disk tell.

    Data sets on disk are not opened: a plan may be made elsewhere. ImageNet's size stands for one of its classes.
    """
    data = config.data
    if data.images_per_class:
        return data.images_per_class * config.model.num_classes
    if data.name == "synthetic":
        return data.synthetic_samples
    if data.name == "canvases":
        return data.dense.canvases
    if data.name in ("coco", "label_maps"):
        return _DENSE.get((data.name, config.model.num_classes))
    if data.name == "digits":
        try:
            return len(build_dataset(data, "train", img_size=config.model.img_size))
        except ValueError:  # scikit-learn is not installed
            return None
    return _IMAGENET[21841] if data.name == "imagenet22k" else _IMAGENET.get(config.model.num_classes)


def describe_costs(costs: Costs) -> list[str]:
    """Returns the costs as lines of the table."""
    if costs.days is None:
        lines = [f"schedule: {costs.epochs:g} epochs of an unknown number of images, or of too few; --images N says it"]
    else:
        lines = [
            f"schedule: {costs.epochs:g} epochs of {costs.images_per_epoch:,} images, {costs.steps:,} steps: "
            f"{_time(86400 * costs.days)}, {costs.energy_kwh:,.2f} kWh, {costs.price_dollars:,.2f} dollars"
        ]
    lines.append(
        f"checkpoint: {costs.checkpoint_bytes / 2**30:.2f} GiB, saved in {_time(costs.save_seconds)}, resharded on one "
        f"node in {_time(costs.reshard_seconds)}"
    )
    return lines


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s"

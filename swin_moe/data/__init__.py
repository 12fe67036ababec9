"""Images for training and evaluation: data sets, augmentation, mixing and the loaders that join them."""

from swin_moe.data.datasets import DATASETS, BrokenImage, build_dataset
from swin_moe.data.loader import EvalLoader, StepBatches, TrainLoader
from swin_moe.data.mixing import mix, mixing_enabled, partners

__all__ = [
    "DATASETS",
    "BrokenImage",
    "EvalLoader",
    "StepBatches",
    "TrainLoader",
    "build_dataset",
    "mix",
    "mixing_enabled",
    "partners",
]

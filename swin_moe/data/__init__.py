"""Images for training and evaluation: data sets, augmentation, mixing and the loaders that join them.

The table is datasets.DATASETS. A new row needs the members of base.Dataset: a length, and image and label by number;
which of them a step sees is loader.py's business, as a pure function of seed and step.
"""

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

"""Makes `import torchvision`, and so `import timm`, work beside a CPU-only torch.

The torchvision wheel on PyPI is a CUDA build: its `_C.so` does not load beside a CPU torch. That alone would be
harmless, as transforms and data sets are pure Python, but `torchvision/_meta_registrations.py` registers fake kernels
for `torchvision::nms` and `torchvision::qnms` without checking that the operators exist (all others are guarded), and
the import fails. Declaring these two schemas is all that is missing (torchvision 0.28).
"""

import functools
import sys
from types import ModuleType

import torch

_UNGUARDED = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def _declare_operators() -> torch.library.Library:
    """Returns the library that owns the two schemas; they live as long as it does, hence the cache."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in _UNGUARDED:
        library.define(schema)
    return library


def import_torchvision() -> ModuleType:
    """Returns the torchvision module; call it before anything that imports torchvision, such as timm.

    The plain import is tried first: where `_C.so` loads, it defines the operators itself and a second
    definition would be an error.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) and "torchvision::qnms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_operators()
        import torchvision
    return torchvision

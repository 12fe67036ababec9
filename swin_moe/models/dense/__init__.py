"""Networks over maps: pyramid.py, the backbone of dense tasks, in a network.py; fpn.py, upernet.py and inference.py on
it; layers.py and norms.py, which heads share; counting.py, their work.

There is no table here: a family is a row of VARIANTS (swin_moe/config/variants.py), and pyramid.py takes each of them.
A new network needs the official names of its parameters and a task that trains it (swin_moe/tasks/).
"""

from swin_moe.models.dense.fpn import FPN
from swin_moe.models.dense.pyramid import Pyramid, PyramidBackbone

__all__ = ["FPN", "Pyramid", "PyramidBackbone"]

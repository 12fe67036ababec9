"""The Swin family as one network: swin.py, of blocks in attention.py and layers.py; heads.py and contrastive.py on it.

The table is VARIANTS (swin_moe/config/variants.py). A new row needs what differs: mixer, position bias, scores, norms;
official.py reads and writes official files for it.
"""

from swin_moe.config.variants import VARIANTS, Variant
from swin_moe.models.build import build_model, create_model
from swin_moe.models.network import Network
from swin_moe.models.swin import Encoded, SwinTransformer

__all__ = ["VARIANTS", "Encoded", "Network", "SwinTransformer", "Variant", "build_model", "create_model"]

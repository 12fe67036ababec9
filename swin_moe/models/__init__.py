"""The Swin family as one network; see swin.py for the table of differences."""

from swin_moe.config.variants import VARIANTS, Variant
from swin_moe.models.build import build_model, create_model
from swin_moe.models.network import Network
from swin_moe.models.swin import Encoded, SwinTransformer

__all__ = ["VARIANTS", "Encoded", "Network", "SwinTransformer", "Variant", "build_model", "create_model"]

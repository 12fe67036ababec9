"""The Swin family as one network; see swin.py for the table of differences."""

from swin_moe.models.build import build_model, create_model
from swin_moe.models.swin import VARIANTS, Encoded, SwinTransformer, Variant

__all__ = ["VARIANTS", "Encoded", "SwinTransformer", "Variant", "build_model", "create_model"]

"""Routing choices (model.moe.choice): who chooses whom, one file and one row each.

The table is swin_moe.config.choices.CHOICES. A new row needs a subclass of base.Choice here, and there what the choice
means to configs, summaries and counts of work, with the place of the class (routed_by).
"""

from swin_moe.config import MoEConfig
from swin_moe.config.choices import CHOICES
from swin_moe.moe.choices.base import Choice, Routed, RoutingStats
from swin_moe.registry import lookup


def build_choice(config: MoEConfig, layer: int) -> Choice:
    """Returns the choice of a layer, the block of this number in the network."""
    routed_by = {name: facts.routed_by for name, facts in CHOICES.items()}
    return lookup(routed_by, config.choice, key="model.moe.choice")(config, layer)


__all__ = ["Choice", "Routed", "RoutingStats", "build_choice"]

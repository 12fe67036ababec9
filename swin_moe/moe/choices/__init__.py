"""Routing choices (model.moe.choice): who chooses whom, one file and one row each.

The table is CHOICES. A new row needs a subclass of base.Choice here, and a row of the same name in
swin_moe.config.choices, which says what the choice means to configs, summaries and counts of work.
"""

from swin_moe.config import MoEConfig
from swin_moe.moe.choices.base import Choice, Routed, RoutingStats
from swin_moe.registry import lookup

CHOICES = {
    "token": "swin_moe.moe.choices.token:TokenChoice",
    "expert": "swin_moe.moe.choices.expert:ExpertChoice",
    "soft": "swin_moe.moe.choices.soft:SoftChoice",
}


def build_choice(config: MoEConfig, layer: int) -> Choice:
    """Returns the choice of a layer, the block of this number in the network."""
    return lookup(CHOICES, config.choice, key="model.moe.choice")(config, layer)


__all__ = ["CHOICES", "Choice", "Routed", "RoutingStats", "build_choice"]

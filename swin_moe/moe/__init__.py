"""The Mixture-of-Experts layer for one process; swin_moe.parallel spreads it over ranks.

layer.py reads as the layer runs: router, choice, dispatch, experts, combine. Tables: routers.ROUTERS (logits of tokens)
and config.choices.CHOICES (who goes where); docs/adding_a_router.md and adding_a_choice.md say what a new row needs.
"""

from swin_moe.moe.choices import RoutingStats
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing, expert_capacity, route

__all__ = ["MoELayer", "Routing", "RoutingStats", "expert_capacity", "route"]

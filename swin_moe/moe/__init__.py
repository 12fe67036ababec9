"""The Mixture-of-Experts layer for one process; swin_moe.parallel spreads it over ranks."""

from swin_moe.moe.choices import RoutingStats
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import Routing, expert_capacity, route

__all__ = ["MoELayer", "Routing", "RoutingStats", "expert_capacity", "route"]

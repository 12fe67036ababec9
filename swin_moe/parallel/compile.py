"""Compiled networks: what is traced as one graph, and what cannot be.

Every block is a graph of its own, or the network is one. What is compiled is a module's `forward`, in place: names of
parameters stay, and hooks of engines (FSDP2's gathering, the heartbeat) run outside of the graph. Draws and routing
are functions of tensors and of the step, so one graph per shape serves all steps: the second step makes the step a
variable, and nothing is compiled after it while shapes stay. Evaluation is not compiled: its batches end ragged.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from swin_moe.config import MoEConfig
from swin_moe.config.choices import facts_of
from swin_moe.moe.dispatch import LocalDispatcher, PaddedDispatcher
from swin_moe.moe.layer import MoELayer

_BLOCK = re.compile(r"(^|\.)layers\.\d+\.blocks\.\d+$")
_GRAPHS_PER_BLOCK = (
    8  # of one place in the source: torch stops compiling it after 8 by default, but all blocks share it
)


def compile_network(model: nn.Module, what: str, *, sharded_experts: bool = False) -> None:
    """Makes training run compiled graphs; call after dispatchers are set.

    Args:
        what: "block" or "model".
        sharded_experts: The engine gathers experts by hooks on them, so their layers stay outside of graphs.
    """
    from torch._dynamo import config  # seconds to import, so only where they are wanted
    from torch._inductor import config as generated

    # On a GPU casts of weights, and what else waits for nothing, share one kernel: a quarter fewer are started.
    generated.combo_kernels = generated.combo_kernels_pointwise_only = True

    for layer in [module for module in model.modules() if isinstance(module, MoELayer)]:
        if sharded_experts or not traceable(layer):
            layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    blocks = {name: module for name, module in model.named_modules() if _BLOCK.search(name)}
    limit = _GRAPHS_PER_BLOCK * max(len(blocks), 1)
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * limit)
    if what == "model":
        model.forward = _in_training(model, fullgraph=True)
        return
    for block in blocks.values():
        whole = all(traceable(m) and not sharded_experts for m in block.modules() if isinstance(m, MoELayer))
        block.forward = _in_training(block, fullgraph=whole)


def _in_training(module: nn.Module, *, fullgraph: bool) -> Callable[..., Any]:
    """Returns the module's forward, compiled where the module is in training."""
    eager = module.forward
    traced = torch.compile(eager, fullgraph=fullgraph)

    @functools.wraps(eager)
    def forward(*arguments: Any, **options: Any) -> Any:
        return (traced if module.training else eager)(*arguments, **options)

    return forward


def traceable(layer: MoELayer) -> bool:
    """Returns whether the whole layer is one graph in training: nothing travels, and no size depends on the data."""
    here = type(layer.dispatcher) in (LocalDispatcher, PaddedDispatcher)
    alone = layer.choice.exchange is None and layer.choice.balance_exchange is None
    return here and alone and static_routing(layer.config)


def static_routing(moe: MoEConfig) -> bool:
    """Returns whether no shape of a layer's forward on one process depends on the data, or can be left unknown."""
    return facts_of(moe).compiles_whole and (moe.backend != "padded" or moe.capacity_factor > 0)


def run_eager() -> Any:
    """Returns a context in which compiled networks run as they were written, e.g. because hooks look inside."""
    return torch.compiler.set_stance("force_eager")


def graphs_made() -> int:
    """Returns how many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]

"""What a network does with one image: what it says, experts of patches, attention of a patch, strength of features.

Shape legend: H, W rows and columns of a block's tokens, C channels, K classes.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from swin_moe.config.choices import refuse_choice
from swin_moe.demo.networks import Said, Shown
from swin_moe.inspect_routing import RoutingRecorder
from swin_moe.models.attention import WindowAttention
from swin_moe.run.routing_pictures import PatchMap


@dataclass(frozen=True)
class Looked:
    """What was seen of one image."""

    said: Said
    routing: list[PatchMap]  # of every MoE layer; empty where nothing is routed by tokens
    num_experts: int
    blocks: dict[str, tuple[Tensor, int]]  # name of a block -> (what its attention gets (1, H, W, C), shift of windows)
    strength: list[np.ndarray]  # of every stage (H, W) float32, the length of each position's features

    @property
    def pixels(self) -> np.ndarray:
        """(height, width, 3) uint8, what the network saw."""
        return self.said.pixels


class Observer:
    """Looks at images with one network; keeps nothing of one image for the next."""

    def __init__(self, network: Shown) -> None:
        self.network = network
        named = network.backbone.named_modules()
        self.attention = {name: module for name, module in named if isinstance(module, WindowAttention)}
        self.recorder: RoutingRecorder | None = RoutingRecorder(network.backbone)
        try:
            refuse_choice(network.backbone.config.moe, "inspect-routing")
        except ValueError:  # experts choose tokens, or take all of them a little: no patch has one expert
            self.recorder = None
        if self.recorder is not None and not self.recorder.blocks:
            self.recorder = None

    @torch.inference_mode()
    def look(self, image: object, *, top: int = 5) -> Looked:
        """Returns what the network does with an image.

        Args:
            image: What the network takes: a path, or an image of Pillow's.
            top: Classes at most.
        """
        seen: dict[str, tuple[Tensor, int]] = {}
        with ExitStack() as stack:
            for name, module in self.attention.items():
                handle = module.register_forward_pre_hook(_keep(name, seen), with_kwargs=True)
                stack.callback(handle.remove)
            if self.recorder is not None:
                stack.enter_context(self.recorder.recording())
            said = self.network.say(image, top=top)
        return Looked(
            said=said,
            routing=[] if self.recorder is None else self.recorder.patch_maps(0),
            num_experts=0 if self.recorder is None else self.recorder.num_experts,
            blocks=seen,
            strength=[m.float().norm(dim=0).cpu().numpy() for m in said.maps],
        )

    @torch.inference_mode()
    def attention_of(self, looked: Looked, block: str, row: int, column: int) -> np.ndarray:
        """Returns (H, W) float32: how much the token of a patch takes of each other, mean over heads.

        0 outside its window; the sum is 1 less what padding got.

        Args:
            block: One of looked.blocks.
            row, column: Of the block's tokens.
        """
        x, shift = looked.blocks[block]
        height, width = x.shape[1:3]
        module = self.attention[block]
        dtype = next(module.parameters()).dtype  # in place of what autocast made of the input
        weights, places = module.weights(x.to(dtype), shift=shift)
        window, token = (places == row * width + column).nonzero()[0].tolist()
        there = places[window] >= 0
        found = torch.zeros(height * width, device=x.device)
        found[places[window][there]] = weights[window, :, token].float().mean(dim=0)[there]
        return found.view(height, width).cpu().numpy()


def _keep(name: str, seen: dict[str, tuple[Tensor, int]]):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, arguments: tuple, options: dict) -> None:
        seen[name] = arguments[0].detach().clone(), options.get("shift", 0)

    return hook


def patch_at(looked: Looked, block: str, x: float, y: float) -> tuple[int, int]:
    """Returns row and column of the block's token at a place of the picture; x, y: shares of its width and height."""
    height, width = looked.blocks[block][0].shape[1:3]
    return min(height - 1, max(0, int(y * height))), min(width - 1, max(0, int(x * width)))

"""What a network does with one image: classes, experts of patches, attention of a patch, strength of features.

Shape legend: H, W rows and columns of a block's tokens, C channels, K classes.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from swin_moe.config.choices import refuse_choice
from swin_moe.config.io import load_config
from swin_moe.config.shipped.released import released
from swin_moe.data.transforms import to_rgb
from swin_moe.inspect_routing import RoutingRecorder
from swin_moe.models.attention import WindowAttention
from swin_moe.run.routing_pictures import PatchMap
from swin_moe.weights.pretrained import Loaded, create_model, load, preprocess_of


@dataclass(frozen=True)
class Looked:
    """What was seen of one image."""

    pixels: np.ndarray  # (height, width, 3) uint8, what the network saw
    classes: list[tuple[str, float]]  # name and probability, the likeliest first
    routing: list[PatchMap]  # of every MoE layer; empty where nothing is routed by tokens
    num_experts: int
    blocks: dict[str, tuple[Tensor, int]]  # name of a block -> (what its attention gets (1, H, W, C), shift of windows)
    strength: list[np.ndarray]  # of every stage (H, W) float32, the length of each position's features


def open_network(source: str) -> Loaded:
    """Returns a network with its classes and preprocessing: a run, a checkpoint, a file, or released weights by name.

    Raises:
        ValueError: It is none of them, or no network that classifies.
    """
    if Path(source).exists() or source not in released():
        loaded = load(source)
    else:
        config = load_config(source)
        model = create_model(source, pretrained=True).eval()
        loaded = Loaded(model, (), preprocess_of(config.data, config.model.img_size))
    if not loaded.model.config.num_classes:
        raise ValueError(f"{source}: the network has no classes to show; the demo is for networks that classify")
    return loaded


class Observer:
    """Looks at images with one network; keeps nothing of one image for the next."""

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.names, self.preprocess = loaded.model, loaded.classes, loaded.preprocess
        named = self.model.named_modules()
        self.attention = {name: module for name, module in named if isinstance(module, WindowAttention)}
        self.recorder: RoutingRecorder | None = RoutingRecorder(self.model)
        try:
            refuse_choice(self.model.config.moe, "inspect-routing")
        except ValueError:  # experts choose tokens, or take all of them a little: no patch has one expert
            self.recorder = None
        if self.recorder is not None and not self.recorder.blocks:
            self.recorder = None

    @torch.inference_mode()
    def look(self, image: object, *, top: int = 5) -> Looked:
        """Returns what the network does with an image.

        Args:
            image: What the preprocessing takes: a path, or an image of Pillow's.
            top: Classes at most.
        """
        pixels = self.preprocess(image)  # type: ignore[arg-type]
        seen: dict[str, tuple[Tensor, int]] = {}
        with ExitStack() as stack:
            for name, module in self.attention.items():
                handle = module.register_forward_pre_hook(_keep(name, seen), with_kwargs=True)
                stack.callback(handle.remove)
            if self.recorder is not None:
                stack.enter_context(self.recorder.recording())
            output = self.model(pixels[None])
        logits = output[0] if isinstance(output, tuple) else output
        probability = logits[0].double().softmax(dim=-1)
        best = probability.topk(min(top, len(probability)))
        maps = self.model.forward_features(pixels[None])
        return Looked(
            pixels=to_rgb(pixels),
            classes=[(self._name(int(k)), float(p)) for p, k in zip(best.values, best.indices)],
            routing=[] if self.recorder is None else self.recorder.patch_maps(0),
            num_experts=0 if self.recorder is None else self.recorder.num_experts,
            blocks=seen,
            strength=[m[0].float().norm(dim=0).numpy() for m in maps],
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
        weights, places = self.attention[block].weights(x, shift=shift)
        window, token = (places == row * width + column).nonzero()[0].tolist()
        there = places[window] >= 0
        found = torch.zeros(height * width)
        found[places[window][there]] = weights[window, :, token].float().mean(dim=0)[there]
        return found.view(height, width).numpy()

    def _name(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else f"class {number}"


def _keep(name: str, seen: dict[str, tuple[Tensor, int]]):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, arguments: tuple, options: dict) -> None:
        seen[name] = arguments[0].detach().clone(), options.get("shift", 0)

    return hook


def patch_at(looked: Looked, block: str, x: float, y: float) -> tuple[int, int]:
    """Returns row and column of the block's token at a place of the picture; x, y: shares of its width and height."""
    height, width = looked.blocks[block][0].shape[1:3]
    return min(height - 1, max(0, int(y * height))), min(width - 1, max(0, int(x * width)))

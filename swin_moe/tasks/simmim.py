"""Masked image modelling: hide most of every image and predict its pixels (SimMIM, arXiv:2111.09886).

Masks are a function of (run.seed, step, sample), so neither the layout nor recomputation can change them; those of
evaluation are the same for all runs, so that validation losses compare (the study of arXiv:2206.04664 chooses models
by them).

Shape legend: B images of this micro-batch, S channels, height x width pixels, H x W patches, U mask units of an image,
P pictures.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.data.batch import Batch
from swin_moe.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swin_moe.models.heads import (
    MaskedImageModel,
    local_statistics,
    mask_of_order,
    masked_l1_sum,
    normalize_targets,
    num_masked,
)
from swin_moe.models.layers import widened
from swin_moe.models.network import Network
from swin_moe.randomness import RandomContext, bits
from swin_moe.tasks.base import MicroLoss, StepContext, Task, build_encoder, micro_loss

_MIN_TILE = 96  # pixels a side that a drawn image has at least


class SimMIM(Task):
    """The mean absolute error over hidden pixels, of raw or locally normalized ones (models/simmim.py)."""

    metric = "loss"
    higher_is_better = False

    def __init__(self, config: Config):
        super().__init__(config)
        model, unit = config.model, config.task.simmim.mask_patch_size
        self.patch_size = model.patch_size
        self.grid = (model.img_size[0] // unit, model.img_size[1] // unit)
        self.hidden = num_masked(math.prod(self.grid), config.task.simmim.mask_ratio)
        self.hidden_pixels = self.hidden * unit**2  # of one image
        self._pictures: dict[str, np.ndarray] = {}

    def build_network(self) -> Network:
        """See Task. The encoder has no head, whatever model.num_classes says."""
        encoder = build_encoder(self.config, mask_token=True)
        return MaskedImageModel(encoder, official_groups=self.config.compat.official)

    def masks(self, sample_B: Tensor, *, step: int | None) -> Tensor:
        """Returns the masks (B, H, W) bool of these samples, True = hidden. step: None for evaluation."""
        training = step is not None
        random = RandomContext(self.config.run.seed if training else 0, step or 0, sample_B)
        drawn_BU = bits(random.key("mask", layer=0 if training else 1), sample_B, math.prod(self.grid))
        order_BU = drawn_BU.argsort(dim=1, stable=True)
        patches = self.config.task.simmim.mask_patch_size // self.patch_size[0]
        return mask_of_order(order_BU, self.grid, self.hidden, patches)

    def targets(self, image: Tensor) -> Tensor:
        """Returns what is predicted, (B, S, height, width), in at least float32."""
        image = widened(image)
        window = self.config.task.simmim.target_window
        return normalize_targets(image, window) if window else image

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        """See Task. The official mean over hidden pixels of the whole batch, however it is cut."""
        return self.loss_of(model, self.inputs(batch, context), context)

    def inputs(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """See RecordableLoss. The key of the masks is the host's."""
        mask = self.masks(batch["sample"], step=context.step)
        return {"image": batch["image"], "mask": mask, "sample": batch["sample"]}

    def loss_of(self, model: nn.Module, inputs: Mapping[str, Tensor], context: StepContext) -> MicroLoss:
        """See RecordableLoss."""
        image, mask = inputs["image"], inputs["mask"]
        random = RandomContext(self.config.run.seed, context.step, inputs["sample"], context.words)
        with context.autocast():
            reconstruction, aux = model(image, mask, random=random)
        error = masked_l1_sum(self.targets(image), widened(reconstruction), mask, self.patch_size)
        task = error / (context.num_samples * self.hidden_pixels + 1e-5) / image.shape[1]
        return micro_loss(task, aux, len(image), context)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        """See Task. mean_loss is that of predicting, per image and channel, the mean of its visible pixels."""
        totals, drawn = None, None
        for batch in batches:
            image, sample = batch["image"], batch["sample"]
            mask = self.masks(sample, step=None)
            with context.autocast():
                reconstruction, _ = model(image, mask)
            target, reconstruction = self.targets(image), widened(reconstruction)
            errors = [
                masked_l1_sum(target, guess, mask, self.patch_size).double()
                for guess in (reconstruction, self._visible_mean(target, mask))
            ]
            sums = torch.stack([*errors, errors[0].new_tensor(len(image))])
            totals = sums if totals is None else totals + sums
            drawn = self._draw(drawn, image, reconstruction, mask, sample)
        assert totals is not None and drawn is not None, "an evaluation has a batch, which may have no image"
        if context.world_size > 1:
            dist.all_reduce(totals)
            dist.all_reduce(drawn)
        error, mean_error, count = totals.tolist()
        self._pictures = {"reconstructions": tiled(drawn)} if len(drawn) else {}
        values = count * self.hidden_pixels * self.config.model.in_chans
        return {"loss": error / values, "mean_loss": mean_error / values, "samples": count}

    def pictures(self) -> dict[str, np.ndarray]:
        """See Task. A row per image: what the network saw, its prediction in the hidden places, the original."""
        return self._pictures

    def _pixels(self, mask: Tensor) -> Tensor:
        """Returns the mask of patches as one of pixels, (B, 1, height, width)."""
        height, width = self.patch_size
        return mask.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]

    def _visible_mean(self, target: Tensor, mask: Tensor) -> Tensor:
        """Returns (B, S, 1, 1), the mean of the target over visible pixels."""
        visible = (~self._pixels(mask)).to(target.dtype)
        return (target * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)

    def _draw(
        self, drawn: Tensor | None, image: Tensor, reconstruction: Tensor, mask: Tensor, sample: Tensor
    ) -> Tensor:
        """Returns (P, 3, S, height, width) in [0, 1], rows of this batch filled in; other ranks' rows are zero."""
        if drawn is None:
            rows = self.config.task.simmim.pictures if self.config.model.in_chans == 3 else 0
            drawn = torch.zeros((rows, 3, *image.shape[1:]), device=image.device)
        image = widened(image)
        if self.config.task.simmim.target_window:  # back from normalized to real pixels
            mean, deviation = local_statistics(image, self.config.task.simmim.target_window)
            reconstruction = reconstruction * deviation + mean
        hidden = self._pixels(mask)
        seen, predicted = image.masked_fill(hidden, 0.0), torch.where(hidden, reconstruction, image)
        chosen = sample < len(drawn)
        triple = torch.stack([seen, predicted, image], dim=1)[chosen]
        scale, shift = (triple.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_STD, IMAGENET_MEAN))
        if len(triple):
            drawn[sample[chosen]] = (triple * scale + shift).clamp(0, 1).to(drawn.dtype)
        return drawn


def tiled(drawn: Tensor) -> np.ndarray:
    """Returns (height, width, 3) uint8 of (rows, columns, 3, height, width) in [0, 1]; small images are enlarged."""
    rows, columns, _, height, width = drawn.shape
    factor = max(1, -(-_MIN_TILE // width))
    gap = 4
    sheet = np.full((rows * (height * factor + gap) + gap, columns * (width * factor + gap) + gap, 3), 255, np.uint8)
    tiles = (drawn.float().cpu() * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    for row in range(rows):
        for column in range(columns):
            tile = tiles[row, column].repeat(factor, 0).repeat(factor, 1)
            top, left = gap + row * (height * factor + gap), gap + column * (width * factor + gap)
            sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet

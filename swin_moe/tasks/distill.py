"""Feature distillation: predict the whitened features of a frozen teacher, token by token (arXiv:2205.14141).

Facts: SwinTransformer/Feature-Distillation. Only the student drops paths; crop and flip are the only augmentation.

Shape legend: B images of this micro-batch, H x W tokens of the student, C channels of the teacher.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.data.batch import Batch
from swin_moe.models.heads import FeatureModel
from swin_moe.models.layers import widened
from swin_moe.models.network import Network
from swin_moe.randomness import RandomContext
from swin_moe.tasks.base import MicroLoss, StepContext, Task, build_encoder, micro_loss


class Distill(Task):
    """Smooth L1 of the student's linear prediction against the teacher's features after a LayerNorm without weights."""

    metric = "loss"
    higher_is_better = False
    needs_teacher = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.beta = config.task.distill.smooth_l1_beta

    def build_network(self) -> Network:
        """See Task. The student has no head, whatever model.num_classes says."""
        assert self.teacher is not None, "weights.teacher sets it before"
        return FeatureModel(build_encoder(self.config), self.teacher.num_features)

    @torch.no_grad()
    def targets(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns what is predicted, (B, H, W, C) in at least float32: averaged to the student's grid, whitened."""
        assert self.teacher is not None
        feature_BHWC = self.teacher(image)
        if tuple(feature_BHWC.shape[1:3]) != grid:
            pooled = F.adaptive_avg_pool2d(feature_BHWC.permute(0, 3, 1, 2), grid)
            feature_BHWC = pooled.permute(0, 2, 3, 1)
        return F.layer_norm(feature_BHWC, feature_BHWC.shape[-1:])

    def _error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Returns the sum over all elements."""
        predicted = widened(predicted)
        return F.smooth_l1_loss(predicted, target.to(predicted.dtype), beta=self.beta, reduction="sum")

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        """See Task."""
        return self.loss_of(model, self.inputs(batch, context), context)

    def inputs(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """See RecordableLoss."""
        return {"image": batch["image"], "sample": batch["sample"]}

    def loss_of(self, model: nn.Module, inputs: Mapping[str, Tensor], context: StepContext) -> MicroLoss:
        """See RecordableLoss. The teacher's forward is part of it."""
        image = inputs["image"]
        random = RandomContext(self.config.run.seed, context.step, inputs["sample"], context.words)
        with context.autocast():
            predicted, aux = model(image, random=random)
        target = self.targets(image, tuple(predicted.shape[1:3]))
        task = self._error(predicted, target) / (context.num_samples * math.prod(target.shape[1:]))
        return micro_loss(task, aux, len(image), context)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        """See Task. mean_loss is that of predicting 0, the mean of whitened features."""
        totals = None
        for batch in batches:
            with context.autocast():
                predicted, _ = model(batch["image"])
            target = self.targets(batch["image"], tuple(predicted.shape[1:3]))
            errors = [self._error(guess, target).double() for guess in (predicted, torch.zeros_like(predicted))]
            sums = torch.stack([*errors, errors[0].new_tensor(target.numel()), errors[0].new_tensor(len(target))])
            totals = sums if totals is None else totals + sums
        assert totals is not None, "an evaluation has a batch, which may have no image"
        if context.world_size > 1:
            dist.all_reduce(totals)
        error, mean_error, values, count = totals.tolist()
        return {"loss": error / values, "mean_loss": mean_error / values, "samples": count}

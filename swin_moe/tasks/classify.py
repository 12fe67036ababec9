"""Image classification: soft targets by mixup and label smoothing; exact top-1 and top-5. Also a linear probe.

Shape legend: B images of this micro-batch, K classes.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.data.batch import Batch
from swin_moe.data.mixing import mix, mixing_enabled, partners
from swin_moe.models.layers import widened
from swin_moe.randomness import RandomContext
from swin_moe.tasks.base import MicroLoss, StepContext, Task, micro_loss


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the sum over images of -sum_k target log softmax(logits), in at least float32; 0 for no images."""
    logits = widened(logits)
    return -(target.to(logits.dtype) * F.log_softmax(logits, dim=-1)).sum()


class Classify(Task):
    """Cross entropy with the official mixing and smoothing (microsoft/Swin-Transformer, main.py, data/build.py).

    With optim.freeze=backbone only the class head learns: the features are those of evaluation, without drop path,
    gate noise or dropped tokens.
    """

    metric = "top1"
    higher_is_better = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.needs_partners = mixing_enabled(config.task.classify)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        """See Task."""
        return self.loss_of(model, self.inputs(batch, context), context)

    def inputs(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """See RecordableLoss. Kind and box of the mix are the host's."""
        partner_images, partner_targets = partners(batch) if "partner" in batch else (None, None)
        image, target_BK = mix(
            batch["image"],
            batch["target"],
            num_classes=self.config.model.num_classes,
            config=self.config.task.classify,
            seed=self.config.run.seed,
            step=context.step,
            partner_images=partner_images,
            partner_targets=partner_targets,
            official=self.config.compat.official,
        )
        return {"image": image, "target": target_BK, "sample": batch["sample"]}

    def loss_of(self, model: nn.Module, inputs: Mapping[str, Tensor], context: StepContext) -> MicroLoss:
        """See RecordableLoss."""
        random = RandomContext(self.config.run.seed, context.step, inputs["sample"], context.words)
        if self.config.optim.freeze == "backbone":
            model.eval()
        with context.autocast():
            output = model(inputs["image"], random=random)
        logits_BK, aux = output if isinstance(output, tuple) else (output, None)
        task = soft_cross_entropy(logits_BK, inputs["target"]) / context.num_samples
        return micro_loss(task, aux, len(inputs["image"]), context)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        """See Task. Every sample counts once; sums are reduced once at the end, as integers and float64."""
        totals = None
        for batch in batches:
            with context.autocast():
                output = model(batch["image"])
            logits_BK = (output[0] if isinstance(output, tuple) else output).float()
            target_B = batch["target"]
            top_k = min(5, logits_BK.shape[1])
            hit_Bk = logits_BK.topk(top_k, dim=1).indices == target_B[:, None]
            loss = F.cross_entropy(logits_BK, target_B, reduction="sum").double()
            sums = torch.stack(
                [
                    loss,
                    hit_Bk[:, :1].sum().double(),
                    hit_Bk.sum().double(),
                    torch.tensor(float(len(target_B)), dtype=torch.float64, device=loss.device),
                ]
            )
            totals = sums if totals is None else totals + sums
        assert totals is not None, "an evaluation has a batch, which may have no image"
        if context.world_size > 1:
            dist.all_reduce(totals)
        loss, top1, top5, count = totals.tolist()
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "samples": count}

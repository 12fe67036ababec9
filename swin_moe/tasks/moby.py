"""Contrastive pre-training without labels: MoBY (arXiv:2105.04553), MoCo v2's queues with BYOL's two networks.

Nothing depends on the layout: batch norm sees the images of all ranks, keys enter the queues in the order of the global
batch, and their place is a function of how many images were seen. Hence no accumulation: a forward is a whole step.

Shape legend: B images of this rank, D channels of keys, Q rows of a queue.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.data.batch import Batch
from swin_moe.models.contrastive import BatchNorm, ContrastiveModel
from swin_moe.models.network import Network
from swin_moe.parallel.groups import Groups
from swin_moe.parallel.rank_exchange import RankExchange
from swin_moe.randomness import RandomContext
from swin_moe.tasks.base import MicroLoss, Parts, StepContext, StepDone, Task, build_encoder, micro_loss
from swin_moe.tasks.features import everywhere, extract, gathered


class MoBY(Task):
    """Cross entropy of each view's prediction against the other's key among the keys of earlier images."""

    metric = "knn"
    higher_is_better = True
    needs_views = True
    changes_weights = True

    def build_network(self) -> Network:
        """See Task. The encoders have no head, whatever model.num_classes says."""
        task = self.config.task.moby
        sizes = {"queue": task.queue, "hidden_dim": task.hidden_dim, "num_features": task.num_features}
        return ContrastiveModel(build_encoder(self.config), temperature=task.temperature, **sizes)

    def connect(self, model: nn.Module, groups: Groups) -> None:
        """See Task."""
        assert isinstance(model, Network), "as build_network gave it"
        self._keys: tuple[Tensor, ...] = ()  # of both views, and the samples
        self._followed = model.momentum_pairs()
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.exchange = None if groups.world is None else RankExchange(groups.world)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> MicroLoss:
        """See Task."""
        loss = self.loss_of(model, self.inputs(batch, context), context)
        self.keep(loss.kept)
        return loss

    def inputs(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """See RecordableLoss."""
        return {"image": batch["image"], "view": batch["view"], "sample": batch["sample"]}

    def loss_of(self, model: nn.Module, inputs: Mapping[str, Tensor], context: StepContext) -> MicroLoss:
        """See RecordableLoss."""
        sample = inputs["sample"]
        random = RandomContext(self.config.run.seed, context.step, sample, context.words)
        with context.autocast():
            contrast = model(inputs["image"], inputs["view"], random=random)
        first = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)  # where the positive one stands
        losses = [F.cross_entropy(logits, first, reduction="sum") for logits in contrast.logits]
        task = sum(losses[1:], losses[0]) / context.num_samples
        return micro_loss(task, contrast.aux, len(sample), context, (*contrast.keys, sample))

    def keep(self, kept: tuple[Tensor, ...]) -> None:
        """See Keeps. The keys enter the queues after the update."""
        self._keys = kept

    def after_step(self, parts: Parts, done: StepDone) -> None:
        """See Task. Moves the momentum networks, and puts the step's keys where the oldest ones are."""
        momentum = momentum_at(self.config.task.moby.momentum, done.step + 1, done.total_steps)
        for name, online in self._followed.items():
            parts[name][0].lerp_(parts[online][0], 1 - momentum)
        assert self._keys, "a step has a loss"
        *keys, sample = (gathered(x) for x in self._keys)
        order = sample.argsort()
        for name, key in zip(("queue1", "queue2"), keys):
            part, chunk = parts[name]
            if part.numel():
                place = {"first_row": chunk.offset[0], "size": self.config.task.moby.queue}
                enqueue(part, key[order].to(part), position=done.samples_before, **place)
        self._keys = ()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], context: StepContext) -> dict[str, float]:
        """See Task: how many validation images have a nearest other validation image of their class, percent.

        Labels serve this number only. `swin-moe evaluate-features` compares with the training images.
        """
        own = everywhere(extract(model, batches, context))
        return {"knn": leave_one_out(own.feature_NC, own.label_N), "samples": float(len(own.label_N))}


def momentum_at(base: float, step: int, total: int) -> float:
    """Returns the momentum of the moving average at a step: a cosine from `base` to 1 (models/moby.py)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total) + 1) / 2


def enqueue(part_RD: Tensor, key_ND: Tensor, *, first_row: int, size: int, position: int) -> None:
    """Writes keys to the rows of a ring of `size` rows that `part_RD` holds, which are first_row, first_row + 1, ...

    position: Keys that were written before; key n goes to row (position + n) modulo size. Of more keys than rows the
        last ones stay.
    """
    count = min(len(key_ND), size)
    place = (position + torch.arange(len(key_ND) - count, len(key_ND), device=key_ND.device)) % size - first_row
    mine = (place >= 0) & (place < len(part_RD))
    part_RD[place[mine]] = key_ND[len(key_ND) - count :][mine]


def leave_one_out(feature_NC: Tensor, label_N: Tensor, *, at_once: int = 1024) -> float:
    """Returns how many images have a nearest other image of the same label, percent."""
    feature_NC, hits = F.normalize(feature_NC, dim=1), 0
    for start in range(0, len(label_N), at_once):
        similarity = feature_NC[start : start + at_once] @ feature_NC.t()
        rows = torch.arange(len(similarity), device=similarity.device)
        similarity[rows, start + rows] = -math.inf
        hits += int((label_N[similarity.argmax(dim=1)] == label_N[start : start + at_once]).sum())
    return 100 * hits / len(label_N)

"""What frozen features are worth: nearest neighbours, and a ridge regression on a few images of each class.

Shape legend: N images of this rank, M images of all ranks, Q queries, C channels, K classes, k neighbours.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.data.batch import Batch
from swin_moe.models import SwinTransformer
from swin_moe.tasks.base import StepContext

_AT_ONCE = 1024  # queries that are compared


class Features(NamedTuple):
    """Pooled features of images, and their labels."""

    feature_NC: Tensor  # float32
    label_N: Tensor  # int64


@torch.no_grad()
def extract(feature_of: Callable[[Tensor], Tensor], batches: Iterable[Batch], context: StepContext) -> Features:
    """Returns the features of this rank's images. feature_of: images -> (B, C)."""
    features, labels = [], []
    for batch in batches:
        with context.autocast():
            feature_BC = feature_of(batch["image"])
        features.append(feature_BC.float())
        labels.append(batch["target"])
    return Features(torch.cat(features), torch.cat(labels))


def pooled(backbone: SwinTransformer, image: Tensor) -> Tensor:
    """Returns (B, C), the mean over the normalized tokens of the last stage: what a class head sees."""
    return backbone.encode(image).tokens.flatten(1, 2).mean(dim=1)


class Pooled(nn.Module):
    """A backbone whose forward gives `pooled`."""

    def __init__(self, backbone: SwinTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        """Returns (B, C)."""
        return pooled(self.backbone, image)


def everywhere(features: Features) -> Features:
    """Returns the images of all ranks, in rank order, on every rank."""
    return Features(gathered(features.feature_NC), gathered(features.label_N))


def gathered(x: Tensor) -> Tensor:
    """Returns the rows of all ranks; ranks may have different numbers of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    world = dist.get_world_size()
    counts = [x.new_empty(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(x)], dtype=torch.int64, device=x.device))
    most = int(max(counts))
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    rows = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(rows, padded)
    return torch.cat([row[: int(count)] for row, count in zip(rows, counts)])


def knn_accuracy(train: Features, query: Features, *, neighbours: int, num_classes: int, temperature: float) -> float:
    """Returns the top-1 accuracy, percent, of a weighted vote of the nearest training images by cosine.

    A neighbour votes with exp(cosine / temperature) (Z. Wu et al., arXiv:1805.01978). Training features stay on their
    ranks; every rank finds its own nearest of all queries, and the nearest of those are kept.

    Args:
        train: Of this rank.
        query: Of this rank too.
        neighbours: k; at most the training images.
    """
    query = everywhere(query)
    bank_NC = F.normalize(train.feature_NC, dim=1)
    hits = 0
    for start in range(0, len(query.label_N), _AT_ONCE):
        query_QC = F.normalize(query.feature_NC[start : start + _AT_ONCE], dim=1)
        similarity_QN = query_QC @ bank_NC.t()
        best = similarity_QN.topk(min(neighbours, len(bank_NC)), dim=1)
        # Transposed, so that ranks with different numbers of candidates are joined along rows.
        near_QM = gathered(best.values.t().contiguous()).t()
        label_QM = gathered(train.label_N[best.indices].t().contiguous()).t()
        chosen = near_QM.topk(min(neighbours, near_QM.shape[1]), dim=1)
        votes_QK = query_QC.new_zeros(len(query_QC), num_classes)
        votes_QK.scatter_add_(1, label_QM.gather(1, chosen.indices), (chosen.values / temperature).exp())
        hits += int((votes_QK.argmax(dim=1) == query.label_N[start : start + _AT_ONCE]).sum())
    return 100 * hits / len(query.label_N)


def ridge_accuracy(train: Features, query: Features, *, num_classes: int, l2: float) -> float:
    """Returns the top-1 accuracy, percent, of a ridge regression from standardized features to +-1 per class.

    The few-shot evaluation of ViT and V-MoE (arXiv:2010.11929, 2106.05974), solved in closed form in float64.

    Args:
        train: Of this rank; a few images of each class.
        l2: The penalty; 1024 in those papers.
    """
    train, query = everywhere(train), everywhere(query)
    mean_C, deviation_C = train.feature_NC.double().mean(0), train.feature_NC.double().std(0, correction=0)

    def standardized(feature: Tensor) -> Tensor:
        scaled = (feature.double() - mean_C) / (deviation_C + 1e-8)
        return torch.cat([scaled, scaled.new_ones(len(scaled), 1)], dim=1)

    x = standardized(train.feature_NC)
    wanted_MK = F.one_hot(train.label_N, num_classes).double() * 2 - 1
    gram = x.t() @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    scores_QK = standardized(query.feature_NC) @ torch.linalg.solve(gram, x.t() @ wanted_MK)
    return 100 * float((scores_QK.argmax(dim=1) == query.label_N).double().mean())

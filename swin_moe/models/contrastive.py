"""The network of MoBY: an online encoder, its moving average, and queues of earlier features (arXiv:2105.04553).

Facts: SwinTransformer/Transformer-SSL, models/moby.py.

Shape legend: B images, C channels of the encoder, D channels of what is compared, Q rows of a queue.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.heads import EncoderModel
from swin_moe.models.initialize import initialize
from swin_moe.models.layers import widened
from swin_moe.models.swin import SwinTransformer
from swin_moe.moe.routing_groups import GroupExchange
from swin_moe.randomness import RandomContext, derive_key

HIDDEN, FEATURES = 4096, 256  # of both heads, in the official configs


class Contrast(NamedTuple):
    """What one forward gives: similarities over temperature, the positive one first, and the keys of both views."""

    logits: tuple[Tensor, Tensor]  # (B, 1 + Q) each: view 1 against view 2 and its queue, and the reverse
    keys: tuple[Tensor, Tensor]  # (B, D) each, of length 1
    aux: Tensor | None  # mean over the views of the online encoder's auxiliary loss


class BatchNorm(nn.Module):
    """Batch normalization over the images of all ranks, by counts, so that ranks may have different numbers of them.

    Always by the statistics of the batch, as both networks of MoBY are always in training mode; none are kept.
    """

    exchange: GroupExchange | None = None  # of all ranks; None = this process has all images

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BC: Tensor) -> Tensor:
        """Returns (B, C), in at least float32."""
        x_BC = widened(x_BC)
        count = self._total(x_BC.new_full((1,), float(len(x_BC))))
        mean_C = self._total(x_BC.sum(0)) / count
        centred_BC = x_BC - mean_C
        variance_C = self._total(centred_BC.square().sum(0)) / count
        return centred_BC * (variance_C + 1e-5).rsqrt() * self.weight + self.bias

    def _total(self, value: Tensor) -> Tensor:
        return value if self.exchange is None else self.exchange.sum(value)


class Head(nn.Module):
    """Two linear layers with BatchNorm and ReLU between them: the projector and the predictor."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.norm = BatchNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x_BC: Tensor) -> Tensor:
        """Returns (B, out_dim)."""
        return self.fc2(F.relu(self.norm(self.fc1(x_BC))))


class ContrastiveModel(EncoderModel):
    """Online encoder, projector and predictor; a momentum encoder and projector; two queues of keys."""

    def __init__(
        self,
        encoder: SwinTransformer,
        *,
        queue: int,
        temperature: float,
        hidden_dim: int = HIDDEN,
        num_features: int = FEATURES,
    ) -> None:
        """queue: Keys that each queue holds, Q. Only the online encoder drops paths."""
        super().__init__(encoder)
        self.temperature = temperature
        self.projector = Head(encoder.num_features, hidden_dim, num_features)
        self.predictor = Head(num_features, hidden_dim, num_features)
        still = replace(encoder.config, drop_path_rate=0.0)
        self.momentum_encoder = SwinTransformer(still, recompute="none").requires_grad_(False)
        self.momentum_projector = Head(encoder.num_features, hidden_dim, num_features).requires_grad_(False)
        self.queue1 = nn.Parameter(torch.empty(queue, num_features), requires_grad=False)
        self.queue2 = nn.Parameter(torch.empty(queue, num_features), requires_grad=False)

    def forward(
        self, view1: Tensor, view2: Tensor | None = None, random: RandomContext | None = None
    ) -> Contrast | Tensor:
        """Returns the comparison of two views (B, channels, height, width) of the same images.

        Of one view alone: the online encoder's features (B, C), for evaluation.
        """
        if view2 is None:
            return _pooled(self.encoder.encode(view1).tokens)
        views = (view1, view2)
        draws = [_of_view(random, number) for number in (0, 1)]
        encoded = [self.encoder.encode(view, random=draw) for view, draw in zip(views, draws)]
        queries = [self.predictor(self.projector(_pooled(e.tokens))) for e in encoded]
        with torch.no_grad():
            keys = [
                self.momentum_projector(_pooled(self.momentum_encoder.encode(view, random=draw).tokens))
                for view, draw in zip(views, draws)
            ]
        query1, query2, key1, key2 = (F.normalize(widened(x), dim=1) for x in (*queries, *keys))
        logits = (self._logits(query1, key2, self.queue2), self._logits(query2, key1, self.queue1))
        aux1, aux2 = (e.aux for e in encoded)
        aux = None if aux1 is None or aux2 is None else (aux1 + aux2) / 2
        return Contrast(logits, (key1, key2), aux)

    def _logits(self, query_BD: Tensor, key_BD: Tensor, queue_QD: Tensor) -> Tensor:
        """Returns (B, 1 + Q)."""
        positive_B1 = (query_BD * key_BD).sum(1, keepdim=True)
        negative_BQ = query_BD @ queue_QD.to(query_BD.dtype).t()
        return torch.cat([positive_B1, negative_BQ], dim=1) / self.temperature

    def init_weights(self, seed: int, only: Collection[nn.Module] | None = None) -> None:
        """See EncoderModel. The momentum networks begin as the online ones; queues as random directions."""
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.init_weights(seed, only)
        std = self.encoder.config.init_std
        for head in (self.projector, self.momentum_projector):
            initialize(head, derive_key(seed, 1), std=std, only=only)
        initialize(self.predictor, derive_key(seed, 2), std=std, only=only)
        if only is not None and self not in only:
            return
        for number, queue in enumerate((self.queue1, self.queue2)):
            generator = torch.Generator().manual_seed(derive_key(seed, 3, number))
            rows = torch.randn(queue.shape, generator=generator)
            with torch.no_grad():
                queue.copy_(F.normalize(rows, dim=1))

    def momentum_pairs(self) -> dict[str, str]:
        """See Network."""
        names = [name for name, _ in self.named_parameters() if name.startswith("momentum_")]
        return {name: name.removeprefix("momentum_") for name in names}

    def active_flops(self) -> float:
        """See EncoderModel: two views online, and two forwards more, each a third of a training step's work."""
        heads = sum(p.numel() for head in (self.projector, self.predictor) for p in head.parameters() if p.ndim == 2)
        momentum = sum(p.numel() for p in self.momentum_projector.parameters() if p.ndim == 2)
        return 2 * (self.encoder.active_flops() + heads) + 2 * (self.encoder.active_flops() + momentum) / 3


def _of_view(random: RandomContext | None, number: int) -> RandomContext | None:
    """Returns what one of the two views draws from; None as in SwinTransformer.forward."""
    if random is None:
        return None
    assert not isinstance(random.seed, Tensor), "the trainer's seed is a number"
    seed, words = derive_key(random.seed, number) >> 1, random.words
    if words is not None:  # of a recording, which reads the step there
        words = torch.stack([torch.full_like(words[0], seed), words[1]])
    return replace(random, seed=seed, words=words)


def _pooled(tokens_BHWC: Tensor) -> Tensor:
    return tokens_BHWC.flatten(1, 2).mean(dim=1)

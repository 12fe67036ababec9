"""The logits of a router and what is made of them: noise and scores. Shapes: T tokens, E experts (or slots)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swin_moe.config import MoEConfig
from swin_moe.moe.routing import Routing, pick, row_blocks
from swin_moe.ops.random_draws import gate_noise, with_words
from swin_moe.randomness import RandomContext


@dataclass(frozen=True)
class Scored:
    """The logits of T tokens and what was made of them, each (T, E): all that routing may hold of that size."""

    clean: Tensor
    noisy: Tensor  # clean in evaluation
    scores: Tensor  # of the noisy logits: who is chosen, and the gates
    probabilities: Tensor | None  # softmax of the clean logits; None with sigmoid scores

    @classmethod
    def of(cls, config: MoEConfig, clean: Tensor, noisy: Tensor) -> "Scored":
        """Returns the logits with their scores, by model.moe.scores."""
        if config.scores == "softmax":
            scores = torch.softmax(noisy, dim=1)
            return cls(clean, noisy, scores, scores if noisy is clean else torch.softmax(clean, dim=1))
        return cls(clean, noisy, torch.sigmoid(noisy), None)

    @property
    def softmax(self) -> Tensor:
        """The softmax of the clean logits, where scores are softmax."""
        assert self.probabilities is not None, "sigmoid scores have no probabilities"
        return self.probabilities

    def threshold(self, routing: Routing) -> Tensor:
        """Returns (T,), the noisy logit of every token's last choice."""
        return pick(self.noisy, routing.expert[:, -1:]).squeeze(1)


def with_noise(
    config: MoEConfig, layer: int, clean: Tensor, random: RandomContext | None, token: Tensor | None
) -> Tensor:
    """Returns the logits with model.moe.gate_noise; `clean` itself where there is none.

    Args:
        layer: Number of the block in the network; the noise depends on it.
        random, token: What noise is drawn from, and the (T,) global index of every token; None = no noise.
    """
    if random is None or token is None or config.gate_noise <= 0:
        return clean
    random, std = with_words(random), config.gate_noise / config.num_experts
    noisy = torch.empty_like(clean, requires_grad=False)
    for rows in row_blocks(clean):
        noise = gate_noise(random, token[rows], clean.shape[1], layer=layer)
        noisy[rows] = std * noise.to(clean.dtype)
    return noisy.add_(clean)  # into the memory of the noise

"""The shared expert: a dense network beside the routed experts, visited by all tokens (DeepSeekMoE, arXiv:2401.06066).

Shape legend: D channels, H hidden channels.
"""

import torch
from torch import Tensor, nn

from swin_moe.ops.bias_gelu import hidden_layer
from swin_moe.ops.linear import Linear
from swin_moe.randomness import truncated_normal_


class SharedExpert(nn.Module):
    """fc1, exact GELU, fc2. N shared experts are one network of N times the hidden channels (equation 9)."""

    def __init__(self, dim: int, hidden_dim: int, *, fc2_bias: bool) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim, bias=fc2_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., D)."""
        return self.fc2(hidden_layer(self.fc1, x, None))

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        """Fills the weights with truncated normals drawn on the CPU, the biases with zeros."""
        with torch.no_grad():
            for linear in (self.fc1, self.fc2):
                value = torch.empty(linear.weight.shape, dtype=torch.float32)
                truncated_normal_(value, std, generator)
                linear.weight.copy_(value)
                if linear.bias is not None:
                    linear.bias.zero_()

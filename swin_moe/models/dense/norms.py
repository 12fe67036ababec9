"""Batch normalization of maps over all pixels of all ranks, with running statistics that are saved as weights are.

Shape legend: B images (0 is legal), C channels, H x W of a map, R ranks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from swin_moe.layout import Chunk
from swin_moe.models.layers import widened
from swin_moe.moe.routing_groups import GroupExchange

MOMENTUM, EPS = 0.1, 1e-5  # torch's, and the official code's


class BatchNorm2d(nn.Module):
    """Normalizes every channel: in training by the pixels of all images of all ranks, else by the running statistics.

    Ranks may have different numbers of images, or none: sums are exchanged with their counts, not means. The running
    statistics are frozen parameters, so they are checkpointed, averaged (optim.ema) and cut over ranks as weights are;
    they move once per update, by Task.after_step, and a recomputed forward cannot move them twice.
    """

    exchange: GroupExchange | None = None  # of all ranks; None = this process has all images
    frozen: bool = False  # by the running statistics in training too

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.running_mean = nn.Parameter(torch.empty(channels), requires_grad=False)
        self.running_var = nn.Parameter(torch.empty(channels), requires_grad=False)
        self.seen: tuple[Tensor, Tensor] | None = None  # (mean, unbiased variance), (C,) each, of the last training one

    def reset_parameters(self) -> None:
        """Fills the parameters: the identity of maps that are normalized already."""
        with torch.no_grad():
            for parameter, value in ((self.weight, 1), (self.bias, 0), (self.running_mean, 0), (self.running_var, 1)):
                parameter.fill_(value)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns (B, C, H, W), in at least float32."""
        x = widened(x_BCHW)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if not self.training or self.frozen:
            mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
            return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, EPS, False)
        pixels = x.numel() // x.shape[1]
        if self.exchange is None and pixels:
            out, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, EPS)
            self._note(mean, scale.detach().double().pow(-2).sub(EPS), x.new_tensor([float(pixels)]))
            return out
        count = self._total(x.new_tensor([float(pixels)]))
        mean = self._total(x.sum(dim=(0, 2, 3))) / count.clamp(min=1.0)
        centred = x - mean[:, None, None]
        variance = self._total(centred.square().sum(dim=(0, 2, 3))) / count.clamp(min=1.0)
        self._note(mean, variance, count)
        scale = (variance + EPS).rsqrt() * weight
        return centred * scale[:, None, None] + bias[:, None, None]

    def moved(self) -> tuple[Tensor, Tensor]:
        """Returns what the running statistics average next, (mean, variance), and forgets it.

        Raises:
            RuntimeError: No forward in training mode came before.
        """
        if self.seen is None:
            raise RuntimeError("a batch norm has no statistics to average: no training forward came before")
        seen, self.seen = self.seen, None
        return seen

    def _total(self, value: Tensor) -> Tensor:
        return value if self.exchange is None else self.exchange.sum(value)

    def _note(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Keeps the statistics of a batch, with the unbiased variance that running statistics average."""
        with torch.no_grad():
            self.seen = mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1.0)).to(variance.dtype)


def norms_of(model: nn.Module) -> dict[str, BatchNorm2d]:
    """Returns name -> batch norm, of those whose statistics move; as Task.connect gets the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm2d) and not m.frozen}


def move_running(norms: Mapping[str, BatchNorm2d], parts: Mapping[str, tuple[Tensor, Chunk]]) -> None:
    """Moves the running statistics by those of the last training forward, on every rank the part that it holds.

    parts: As Task.after_step gets them.
    """
    for name, norm in norms.items():
        for kind, seen in zip(("running_mean", "running_var"), norm.moved()):
            part, chunk = parts[f"{name}.{kind}"]
            part.lerp_(seen[chunk.offset[0] : chunk.offset[0] + chunk.size[0]].to(part), MOMENTUM)

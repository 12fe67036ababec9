"""The two token mixers, window attention and the spatial MLP, and the geometry of windows they share.

A mixer maps (B, H, W, C) to the same shape at any H and W: maps are padded with zeros at the bottom and right to a
multiple of the window, padded tokens take part, and the padding is cropped afterwards, as in the official detection
backbone (SwinTransformer/Swin-Transformer-Object-Detection).

Shape legend: B images, H x W tokens, C channels, M windows of one image, N = window ** 2 tokens of a window.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swin_moe.config import ModelConfig
from swin_moe.config.variants import VARIANTS
from swin_moe.models.layers import ATTENTION_WEIGHTS, MIXER_OUT, dropout, dropout_factor, pad_to_multiple, token_rows
from swin_moe.ops.attention.choice import choose_path, fused_refusal
from swin_moe.ops.attention.fused import unsupported, unsupported_shape
from swin_moe.ops.attention.geometry import gather_bias, made_once, merge_windows, partition_windows
from swin_moe.ops.attention.half import HalfShape, HalfTensors, attention_half, cut, join, seam_mask
from swin_moe.ops.attention.in_windows import attend_windows, attention_weights, clamped_factor
from swin_moe.ops.attention.reference import without_autocast
from swin_moe.ops.linear import Linear, is_ordinary, is_plain, is_untouched, linear, steady_linear
from swin_moe.randomness import RandomContext

CPB_HIDDEN = 512  # width of the network behind the log-spaced continuous position bias, SwinV2
_CPB_MODULES = (nn.Sequential, nn.Linear, nn.ReLU)  # which make it, unless someone has put others in their place


@dataclass(frozen=True)
class StageGeometry:
    """Width and windows of one stage at the nominal image size."""

    dim: int
    resolution: tuple[int, int]  # tokens, (height, width)
    window: int
    shrunk: bool  # the map is no larger than the configured window: it is one window, and nothing is shifted


def stage_geometry(config: ModelConfig, stage: int) -> StageGeometry:
    """Returns the official geometry of a stage: the window never exceeds the smaller side of the map."""
    height, width = (n // p // 2**stage for n, p in zip(config.img_size, config.patch_size))
    window = max(1, min(config.window_size, height, width))
    shrunk = min(height, width) <= config.window_size
    return StageGeometry(config.embed_dim * 2**stage, (height, width), window, shrunk)


@made_once
def relative_coords_table(window: int, pretrained: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns ((2 * window - 1) ** 2, 2): log-spaced offsets in units of the window the bias was trained with.

    sign(d) log2(|d| + 1) / log2(8) with d = 8 * offset / (pretrained - 1), in float32 as the official buffer.
    """
    offset = torch.arange(1 - window, window, dtype=torch.float32, device=device)
    offset = offset / max(pretrained - 1, 1) * 8
    spaced = torch.sign(offset) * torch.log2(offset.abs() + 1.0) / 3.0
    return torch.cartesian_prod(spaced, spaced).to(dtype)


def fused_problem(
    config: ModelConfig, *, device_type: str | None = None, dtype: torch.dtype = torch.float32
) -> str | None:
    """Returns why fused attention cannot run the first stage that it cannot, or None.

    Args:
        device_type, dtype: What will run, as autocast makes it; None = not known yet, so that only shapes are checked.
    """
    for stage, heads in enumerate(config.num_heads):
        geometry = stage_geometry(config, stage)
        head_dim, window = geometry.dim // heads, (geometry.window,) * 2
        problem = unsupported_shape(head_dim=head_dim, window=window)
        if problem:
            return f"stage {stage}: {problem}"
        if device_type is not None:
            problem = unsupported(device_type=device_type, dtype=dtype, head_dim=head_dim, window=window)
        if problem:
            return problem
    return None


def check_attention(config: ModelConfig, *, device_type: str | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Raises ValueError where model.attention=fused cannot run, with the reason; arguments as fused_problem's."""
    if config.attention == "fused" and VARIANTS[config.name].mixer == "window":
        problem = fused_problem(config, device_type=device_type, dtype=dtype)
        if problem:
            raise ValueError(fused_refusal(problem))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside (shifted) windows with a relative position bias.

    Parameter names are the official ones. log_cpb: the bias is a small network of log-spaced coordinates instead of a
    table; bias_sigmoid: squashed to (0, 16); cosine: scores are cosines times a learned factor (SwinV2).

    at_once: Windows attended at once; 0 = all. Turn after turn, with their scores, queries, keys and values
    forgotten and computed again in backward: SwinV2's sequential self-attention for large images (arXiv:2111.09883,
    section 3.5).

    path: Which implementation runs (swin_moe/ops/attention/half.py), or auto. Windows in turns, weights dropped in
    training, and anything in the place of qkv or proj (LoRA, quantization) are computed window by window whatever it
    says. Hooks on qkv and proj are called.
    """

    def __init__(
        self,
        dim: int,
        window: int,
        num_heads: int,
        *,
        log_cpb: bool,
        bias_sigmoid: bool,
        cosine: bool,
        qkv_bias: bool,
        qk_scale: float | None,
        pretrained_window: int,
        drop: float,
        attn_drop: float,
        layer: int,
        at_once: int = 0,
        path: str = "auto",
    ) -> None:
        super().__init__()
        self.window, self.num_heads, self.layer, self.at_once = window, num_heads, layer, at_once
        self.pretrained_window = pretrained_window or window
        self.bias_sigmoid, self.drop, self.attn_drop = bias_sigmoid, drop, attn_drop
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.path = path
        if log_cpb:
            # Index 1 is the activation: the official names are cpb_mlp.0 and cpb_mlp.2.
            hidden, out = nn.Linear(2, CPB_HIDDEN), nn.Linear(CPB_HIDDEN, num_heads, bias=False)
            self.cpb_mlp = nn.Sequential(hidden, nn.ReLU(inplace=True), out)
            self._kept: tuple[tuple, tuple[Tensor, ...], Tensor] | None = None
        else:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1)) if cosine else None
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias and not cosine)
        # Cosine scores leave the keys without a bias, so query and value biases are stored apart.
        self.q_bias = nn.Parameter(torch.zeros(dim)) if cosine and qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if cosine and qkv_bias else None
        self.proj = Linear(dim, dim)

    def forward(self, x_BHWC: Tensor, *, shift: int = 0, random: RandomContext | None = None) -> Tensor:
        """Returns (B, H, W, C). shift: tokens the windows are displaced by; random: None in evaluation.

        Raises:
            ValueError: path=fused, and the compiled kernels do not compute this.
        """
        shape = HalfShape(self.num_heads, (self.window,) * 2, (shift,) * 2, self.scale)
        drops = random is not None and self.attn_drop > 0.0
        plain = is_plain(self.qkv) and is_plain(self.proj)
        if self.at_once or drops or not (plain or self._only_hooked(x_BHWC)):
            x = self._attend_cut(x_BHWC, shape, random)
        else:
            tensors = self._half_tensors()
            path = choose_path(self.path, x_BHWC, tensors, shape)
            x = attention_half(x_BHWC, tensors, shape, path, layers=None if plain else (self._project, self.proj))
        return dropout(x, self.drop, random, layer=self.layer, site=MIXER_OUT)

    def weights(self, x_BHWC: Tensor, *, shift: int = 0) -> tuple[Tensor, Tensor]:
        """Returns (how much each token takes of each, (W, heads, N, N), window by window; which tokens those are).

        The second is (W, N) int64: the place of a window's token in its image, row by row, -1 for padding.
        """
        shape = HalfShape(self.num_heads, (self.window,) * 2, (shift,) * 2, self.scale)
        windows, full = cut(x_BHWC, shape)
        bias = self.position_bias()
        mask = seam_mask(full, shape, bias)
        added = bias[None] if mask is None else bias[None] + mask[:, None]
        factor = None if self.logit_scale is None else clamped_factor(self.logit_scale)
        weights, _ = attention_weights(self._project(windows), added, self.scale, factor)
        batch, height, width, _ = x_BHWC.shape
        place = torch.arange(1, height * width + 1, device=x_BHWC.device).view(1, height, width, 1)
        return weights, cut(place.expand(batch, -1, -1, -1), shape)[0][..., 0] - 1  # padding is 0 before

    def _only_hooked(self, x_BHWC: Tensor) -> bool:
        """Returns whether any path may call the layers: linear ones, and nobody needs the projection of padding."""
        ours = type(self.qkv) is Linear and type(self.proj) is Linear
        return ours and x_BHWC.shape[1] % self.window == 0 and x_BHWC.shape[2] % self.window == 0

    def _attend_cut(self, x_BHWC: Tensor, shape: HalfShape, random: RandomContext | None) -> Tensor:
        """Returns (B, H, W, C), window by window: some at once, or with weights dropped."""
        windows, full = cut(x_BHWC, shape)
        bias = self.position_bias()
        mask = seam_mask(full, shape, bias)
        if 0 < self.at_once < windows.shape[0]:
            out = self._attend_in_turns(windows, bias, mask, x_BHWC.shape[0], random)
        else:
            rows = self._dropout_rows(windows, x_BHWC.shape[0], random)
            out = self._attend(windows, bias, mask, rows, random)
        return join(out, x_BHWC, full, shape)

    def _attend(
        self, x_WNC: Tensor, bias: Tensor, mask: Tensor | None, rows: Tensor | None, random: RandomContext | None
    ) -> Tensor:
        """Returns what whole windows become, (W, N, C). rows: see _dropout_rows."""
        qkv, factor = self._project(x_WNC), None
        if rows is not None:
            assert random is not None, "rows are those that it draws for"
            tokens = x_WNC.shape[1]
            factor = dropout_factor(self.attn_drop, rows, tokens, random, layer=self.layer, site=ATTENTION_WEIGHTS)
            factor = factor.view(len(x_WNC), self.num_heads, tokens, tokens)
        out = attend_windows(
            qkv,
            bias,
            mask,
            scale=self.scale,
            logit_scale=self.logit_scale,
            dropout_WHNN=factor,
            implementation="auto" if self.path == "fused" else self.path,
        )
        return self.proj(out)

    def _attend_in_turns(
        self, x_WNC: Tensor, bias: Tensor, mask: Tensor | None, batch: int, random: RandomContext | None
    ) -> Tensor:
        """Returns what _attend does, holding the scores of `at_once` windows at a time."""
        rows, outputs = self._dropout_rows(x_WNC, batch, random), []
        per_window = self.num_heads * x_WNC.shape[1]
        for start in range(0, len(x_WNC), self.at_once):
            x = x_WNC[start : start + self.at_once]
            part_mask = part_rows = None
            if mask is not None:
                part_mask = mask[torch.arange(start, start + len(x), device=mask.device) % len(mask)]
            if rows is not None:
                part_rows = rows[start * per_window : (start + len(x)) * per_window]
            arguments = x, bias, part_mask, part_rows, random
            if torch.is_grad_enabled():
                out = checkpoint(self._attend, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out = self._attend(*arguments)
            outputs.append(out)
        return torch.cat(outputs)

    def position_bias(self) -> Tensor:
        """Returns (heads, N, N), the bias of every (query, key) pair of a window."""
        return gather_bias(self.bias_table(), (self.window,) * 2)

    def bias_table(self) -> Tensor:
        """Returns the bias per relative offset, ((2 * window - 1) ** 2, heads)."""
        return self._kept_cpb_table() if hasattr(self, "cpb_mlp") else self.relative_position_bias_table

    def set_window(self, window: int) -> None:
        """Changes the window of a trained layer: a table is resized, a bias network keeps its value per offset."""
        if window != self.window and not hasattr(self, "cpb_mlp"):
            table = self.relative_position_bias_table
            resized = resize_bias_table(table.detach(), window)
            self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.window = window

    def _half_tensors(self) -> HalfTensors:
        table = self.bias_table()
        return HalfTensors(self.qkv.weight, self._qkv_bias(), self.proj.weight, self.proj.bias, table, self.logit_scale)

    def _project(self, x: Tensor) -> Tensor:
        """Returns queries, keys and values (..., 3C), by whatever stands for the layer."""
        if is_plain(self.qkv):
            return linear(x, self.qkv.weight, self._qkv_bias())
        qkv, apart = self.qkv(x), self._bias_apart()
        return qkv if apart is None else qkv + apart.to(qkv.dtype)

    def _qkv_bias(self) -> Tensor | None:
        """Returns the bias of queries, keys and values, (3C,)."""
        apart = self._bias_apart()
        return self.qkv.bias if apart is None else apart

    def _bias_apart(self) -> Tensor | None:
        """Returns the bias that is not the layer's own, (3C,): keys have none. None where the layer has it."""
        query, value = self.q_bias, self.v_bias
        return None if query is None or value is None else torch.cat((query, torch.zeros_like(value), value))

    def _kept_cpb_table(self) -> Tensor:
        """Returns _cpb_table, the last one where the same weights would make it again: on the CPU, without gradients.

        Weights are compared as numbers, some 10 us a layer, so that no way of changing them is missed. On other devices
        the host would wait for that, and nothing cheaper sees every change (writing to .data counts up no version).
        """
        weights = tuple(self.cpb_mlp.parameters())
        on_cpu = all(is_ordinary(w) and w.device.type == "cpu" for w in weights)
        if torch.is_grad_enabled() or not (self._is_cpb_plain() and on_cpu):
            return self._cpb_table()
        key = self.window, self.pretrained_window, weights[0].dtype
        if self._kept is None or self._kept[0] != key or not all(map(torch.equal, self._kept[1], weights)):
            self._kept = key, tuple(w.detach().clone() for w in weights), self._cpb_table()
        return self._kept[2]

    def _is_cpb_plain(self) -> bool:
        """Returns whether calling the bias network does what its weights say and nothing else."""
        return all(type(m) in _CPB_MODULES and is_untouched(m) for m in self.cpb_mlp.modules())

    def _cpb_table(self) -> Tensor:
        """Returns the bias per relative offset, ((2 * window - 1) ** 2, heads), never in half precision by autocast."""
        weight = self.cpb_mlp[0].weight
        assert isinstance(weight, Tensor), "torch does not say so of a module's attributes"
        coords = relative_coords_table(self.window, self.pretrained_window, weight.device, weight.dtype)
        with without_autocast(weight.device.type):
            last = self.cpb_mlp[2]  # of few heads: threads would share the sums of this product and of its gradient
            if isinstance(last, nn.Linear) and last.bias is None and self._is_cpb_plain():
                table = steady_linear(self.cpb_mlp[1](self.cpb_mlp[0](coords)), last.weight)
            else:
                table = self.cpb_mlp(coords)
        # Before the gather: N ** 2 / (2 * window - 1) ** 2, about a quarter, of the sigmoids of the official order.
        return 16.0 * torch.sigmoid(table) if self.bias_sigmoid else table

    def _dropout_rows(self, x_WNC: Tensor, batch: int, random: RandomContext | None) -> Tensor | None:
        """Returns the global numbers of all rows of attention weights (W * heads * N,); None: nothing is dropped."""
        if random is None or self.attn_drop == 0.0:
            return None
        return token_rows(random.sample, x_WNC.shape[0] // max(batch, 1) * self.num_heads * x_WNC.shape[1])


def resize_bias_table(table: Tensor, window: int) -> Tensor:
    """Returns a position-bias table ((2 * window - 1) ** 2, heads), bicubic as the official load_pretrained."""
    old, new = round(table.shape[0] ** 0.5), 2 * window - 1
    image = table.t().reshape(1, table.shape[1], old, old)
    return F.interpolate(image, size=(new, new), mode="bicubic").view(table.shape[1], new * new).t().contiguous()


class SpatialMLP(nn.Conv1d):
    """Mixes the tokens of a window with one linear map per head (Swin-MLP); the official grouped 1 x 1 convolution.

    Shifted windows are made by zero padding of one window in each direction, without mask or roll.
    """

    def __init__(self, window: int, num_heads: int, *, drop: float, layer: int) -> None:
        units = num_heads * window**2
        super().__init__(units, units, kernel_size=1, groups=num_heads)
        self.window, self.num_heads, self.drop, self.layer = window, num_heads, drop, layer

    def forward(self, x_BHWC: Tensor, *, shift: int = 0, random: RandomContext | None = None) -> Tensor:
        """Returns (B, H, W, C)."""
        batch, height, width, channels = x_BHWC.shape
        x = pad_to_multiple(x_BHWC, self.window, self.window)
        before = self.window - shift if shift else 0
        if shift:
            x = F.pad(x, (0, 0, before, shift, before, shift))
        windows = partition_windows(x, (self.window,) * 2)
        tokens, head_dim = windows.shape[1], channels // self.num_heads
        heads = windows.view(windows.shape[0], tokens, self.num_heads, head_dim).permute(2, 1, 0, 3)
        heads = heads.reshape(self.num_heads, tokens, windows.shape[0] * head_dim)
        weight = self.weight.view(self.num_heads, tokens, tokens)
        assert self.bias is not None, "a convolution has one unless it is told not to"
        # One product per head over all windows at once; the grouped convolution itself is slower on CPU.
        mixed = torch.baddbmm(self.bias.view(self.num_heads, tokens, 1), weight, heads)
        mixed = mixed.view(self.num_heads, tokens, windows.shape[0], head_dim).permute(2, 1, 0, 3)
        x = merge_windows(mixed.reshape(windows.shape), (self.window,) * 2, batch, x.shape[1], x.shape[2])
        x = x[:, before : before + height, before : before + width]
        return dropout(x, self.drop, random, layer=self.layer, site=MIXER_OUT)

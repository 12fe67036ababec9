"""Roll and partition into windows, and merge and roll back, each as one operator that copies whole tokens.

Compiled kernels are in csrc/window/window_shift.cpp and csrc/cuda/window/window_shift.cu; elsewhere the operators run
PyTorch's roll and reshape. Each is the other's gradient.

Shape legend: B images, H x W tokens, C channels, M windows of one image, N tokens of a window.
"""

from typing import Any

import torch
from torch import Tensor

from swin_moe.ops import extension
from swin_moe.ops.attention.geometry import Pair
from swin_moe.ops.transforms import call_operator

SCHEMAS = {
    "window_partition": "window_partition(Tensor x, int window_h, int window_w, int shift_h, int shift_w) -> Tensor",
    "window_merge": (
        "window_merge(Tensor windows, int batch, int height, int width, int window_h, int window_w, int shift_h, "
        "int shift_w) -> Tensor"
    ),
}


def window_partition(x_BHWC: Tensor, *, window: Pair, shift: Pair = (0, 0)) -> Tensor:
    """Returns (B * M, N, C), the windows of every image in row order after a roll by minus the shift; any dtype.

    Args:
        x_BHWC: H and W are multiples of the window.
        window, shift: (height, width) in tokens; 0 <= shift < window.

    Raises:
        ValueError: A shape, window or shift that is not allowed.
    """
    operator = torch.ops.swin_moe.window_partition
    return call_operator(operator, _differentiate_partition, _save_map, x_BHWC, *window, *shift)


def window_merge(windows: Tensor, *, batch: int, height: int, width: int, window: Pair, shift: Pair = (0, 0)) -> Tensor:
    """Returns (B, H, W, C), the inverse of window_partition with the same window and shift.

    Raises:
        ValueError: A shape, window or shift that is not allowed.
    """
    numbers = (batch, height, width, *window, *shift)
    return call_operator(torch.ops.swin_moe.window_merge, _differentiate_merge, _save_windows, windows, *numbers)


def _check(name: str, height: int, width: int, window: Pair, shift: Pair) -> None:
    if min(window) <= 0 or height % window[0] or width % window[1]:
        raise ValueError(f"{name}: height and width must be multiples of the window {window}, got {height} x {width}")
    if any(not 0 <= s < w for s, w in zip(shift, window)):
        raise ValueError(f"{name}: shifts must be at least 0 and less than the window {window}, got {shift}")


def _partition(x: Tensor, window_h: int, window_w: int, shift_h: int, shift_w: int) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"window_partition: x must be (B, H, W, C), got {tuple(x.shape)}")
    batch, height, width, channels = x.shape
    _check("window_partition", height, width, (window_h, window_w), (shift_h, shift_w))
    x = torch.roll(x, (-shift_h, -shift_w), dims=(1, 2))
    x = x.reshape(batch, height // window_h, window_h, width // window_w, window_w, channels).transpose(2, 3)
    return x.reshape(-1, window_h * window_w, channels).clone(memory_format=torch.contiguous_format)


def _merge(
    windows: Tensor, batch: int, height: int, width: int, window_h: int, window_w: int, shift_h: int, shift_w: int
) -> Tensor:
    _check("window_merge", height, width, (window_h, window_w), (shift_h, shift_w))
    rows, columns = height // window_h, width // window_w
    if windows.dim() != 3 or windows.shape[:2] != (batch * rows * columns, window_h * window_w):
        expected = f"({batch * rows * columns}, {window_h * window_w}, C)"
        raise ValueError(f"window_merge: windows must be {expected}, got {tuple(windows.shape)}")
    x = windows.reshape(batch, rows, columns, window_h, window_w, windows.shape[2]).transpose(2, 3)
    x = torch.roll(x.reshape(batch, height, width, windows.shape[2]), (shift_h, shift_w), dims=(1, 2))
    return x.clone(memory_format=torch.contiguous_format)


def _fake_partition(x: Tensor, window_h: int, window_w: int, shift_h: int, shift_w: int) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty((batch * (height // window_h) * (width // window_w), window_h * window_w, channels))


def _fake_merge(windows: Tensor, batch: int, height: int, width: int, *_: int) -> Tensor:
    return windows.new_empty((batch, height, width, windows.shape[2]))


def _save_map(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.map, ctx.numbers = tuple(inputs[0].shape[:3]), inputs[1:]


def _save_windows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.numbers = inputs[4:]


def _differentiate_partition(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.swin_moe.window_merge(grad, *ctx.map, *ctx.numbers), *(None for _ in ctx.numbers)


def _differentiate_merge(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.swin_moe.window_partition(grad, *ctx.numbers), *(None for _ in range(7))


for _name, _kernel, _fake, _gradient, _save in (
    ("window_partition", _partition, _fake_partition, _differentiate_partition, _save_map),
    ("window_merge", _merge, _fake_merge, _differentiate_merge, _save_windows),
):
    _library = extension.register(SCHEMAS[_name], _kernel, _fake)
    torch.library.register_autograd(f"{extension.NAMESPACE}::{_name}", _gradient, setup_context=_save, lib=_library)

"""Where the tokens of a window lie, which row of the bias table a pair has, and what a cyclic shift separates.

The Python twin of csrc/window/window_geometry.h, in the official order of operations (microsoft/Swin-Transformer,
models/swin_transformer.py). Windows and shifts are (height, width) pairs in tokens.

Shape legend: B images, H x W tokens of a map, C channels, M windows of one image, N tokens of a window, A heads.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import detect_fake_mode

MASKED = -100.0  # added to scores across the seam of a cyclic shift; finite as in the official code
Pair = tuple[int, int]


class MadeOnce(Protocol):
    """What made_once makes of a function."""

    cache_info: Callable[[], Any]
    cache_clear: Callable[[], None]

    def __call__(self, *arguments: Any) -> Tensor: ...


class Kept:
    """Fake tensors by function and arguments, while the planner looks at a step that finds them made; else None."""

    fakes: dict[tuple, Tensor] | None = None


def made_once(make: Callable[..., Tensor]) -> MadeOnce:
    """Returns `make`, a function of numbers, devices and dtypes, with its tensors kept: an ordinary one per arguments.

    While a graph is traced, or tensors are fake, nothing is kept and nothing kept is given: a tensor without values
    that one export left behind would be every later model's. cache_info and cache_clear are those of lru_cache.
    """

    @lru_cache(maxsize=256)
    def kept(*arguments: object) -> Tensor:
        # An ordinary tensor even where the first caller is in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments)

    @wraps(make)
    def given(*arguments: object) -> Tensor:
        # The length first: it costs nothing, and there is hardly ever a mode.
        if torch.compiler.is_compiling() or (torch._C._len_torch_dispatch_stack() and detect_fake_mode()):
            fakes = {} if Kept.fakes is None else Kept.fakes
            if (make, *arguments) not in fakes:
                with torch.no_grad():
                    fakes[make, *arguments] = make(*arguments)
            return fakes[make, *arguments]
        return kept(*arguments)

    made = cast(MadeOnce, given)  # as the next line makes it
    made.cache_info, made.cache_clear = kept.cache_info, kept.cache_clear
    return made


def partition_windows(x_BHWC: Tensor, window: Pair) -> Tensor:
    """Returns (B * M, N, C), the windows of every image in row order; H and W are multiples of the window."""
    batch, height, width, channels = x_BHWC.shape
    rows, columns = height // window[0], width // window[1]
    x = x_BHWC.view(batch, rows, window[0], columns, window[1], channels).transpose(2, 3)
    return x.reshape(batch * rows * columns, window[0] * window[1], channels)


def merge_windows(windows: Tensor, window: Pair, batch: int, height: int, width: int) -> Tensor:
    """Returns (B, H, W, C), the inverse of partition_windows."""
    channels = windows.shape[2]
    x = windows.view(batch, height // window[0], width // window[1], *window, channels).transpose(2, 3)
    return x.reshape(batch, height, width, channels)


def padded_size(size: int, window: int) -> int:
    """Returns the smallest multiple of the window that holds a side of `size` tokens."""
    return -(-size // window) * window


@made_once
def relative_position_index(window: Pair, device: torch.device) -> Tensor:
    """Returns (N * N,) int64: the row of the bias table for every (query, key) pair of a window."""
    height, width = window
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    rows = (y[:, None] - y[None, :] + height - 1) * (2 * width - 1)
    return (rows + x[:, None] - x[None, :] + width - 1).flatten()


def gather_bias(table: Tensor, window: Pair) -> Tensor:
    """Returns (A, N, N), the bias of every (query, key) pair, from a table ((2h - 1) * (2w - 1), A)."""
    tokens = window[0] * window[1]
    index = relative_position_index(window, table.device)
    # F.embedding: its backward adds rows in parallel, that of table[index] element by element.
    return F.embedding(index, table).view(tokens, tokens, table.shape[1]).permute(2, 0, 1).contiguous()


@made_once
def shift_mask(
    height: int,
    width: int,
    window: Pair,
    shift: Pair,
    device: torch.device,
    dtype: torch.dtype,
    value: float = MASKED,
) -> Tensor:
    """Returns (M, N, N): 0 between tokens that were neighbours before the cyclic shift, `value` across its seam."""
    region_y, region_x = (
        (torch.arange(n, device=device) >= n - w).long() + (torch.arange(n, device=device) >= n - s).long()
        for n, w, s in ((height, window[0], shift[0]), (width, window[1], shift[1]))
    )
    region = (region_y[:, None] * 3 + region_x[None, :]).view(1, height, width, 1)
    region_MN = partition_windows(region, window)[..., 0]
    across = region_MN[:, :, None] != region_MN[:, None, :]
    return torch.zeros(across.shape, dtype=dtype, device=device).masked_fill_(across, value)

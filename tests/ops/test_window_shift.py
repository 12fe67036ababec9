"""Roll + partition and merge + roll as operators: by hand, against PyTorch's roll and reshape, gradients, contracts."""

import pytest
import torch

from swin_moe.ops import extension
from swin_moe.ops.window_shift import _merge, _partition, window_merge, window_partition

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (batch, height, width, channels), window, shift
CASES = {
    "square": ((2, 8, 8, 16), (4, 4), (2, 2)),
    "not shifted": ((1, 8, 8, 3), (4, 4), (0, 0)),
    "wide map": ((2, 4, 12, 5), (4, 4), (1, 3)),
    "tall map": ((1, 12, 4, 8), (2, 4), (1, 0)),
    "rectangular windows": ((3, 6, 20, 7), (3, 5), (2, 4)),
    "one window": ((2, 7, 9, 24), (7, 9), (3, 8)),
    "windows of one token": ((1, 3, 2, 1), (1, 1), (0, 0)),
    "no image": ((0, 4, 4, 2), (2, 2), (1, 1)),
}


def test_by_hand():
    x = torch.arange(8).view(1, 2, 4, 1)  # 0 1 2 3 / 4 5 6 7
    windows = window_partition(x, window=(1, 2), shift=(0, 1))  # rolled: 1 2 3 0 / 5 6 7 4
    assert windows.flatten(1).tolist() == [[1, 2], [3, 0], [5, 6], [7, 4]]
    assert torch.equal(window_merge(windows, batch=1, height=2, width=4, window=(1, 2), shift=(0, 1)), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_roll_and_reshape(case, dtype, device):
    shape, window, shift = case
    x = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    windows = window_partition(x.to(device), window=window, shift=shift)
    assert torch.equal(windows.cpu(), _partition(x, *window, *shift))
    back = window_merge(windows, batch=shape[0], height=shape[1], width=shape[2], window=window, shift=shift)
    assert torch.equal(back.cpu(), x) and torch.equal(_merge(windows.cpu(), *shape[:3], *window, *shift), x)


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_that_is_not_contiguous(device):
    x = torch.randn(2, 6, 4, 10, device=device).transpose(1, 2)[..., 1:8]
    windows = window_partition(x, window=(2, 3), shift=(1, 2))
    assert torch.equal(windows, window_partition(x.contiguous(), window=(2, 3), shift=(1, 2)))


def test_gradients():
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64, requires_grad=True)
    windows = torch.randn(8, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: window_partition(a, window=(2, 3), shift=(1, 2)), (x,))
    numbers = dict(batch=2, height=4, width=6, window=(2, 3), shift=(1, 2))
    assert torch.autograd.gradcheck(lambda a: window_merge(a, **numbers), (windows,))
    assert torch.autograd.gradgradcheck(lambda a: window_partition(a, window=(2, 3), shift=(1, 2)), (x,))


@pytest.mark.parametrize("device", DEVICES)
def test_contracts_of_an_operator(device):
    x = torch.randn(2, 4, 6, 3, device=device, requires_grad=True)
    windows = torch.randn(8, 6, 3, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.swin_moe.window_partition.default, (x, 2, 3, 1, 2))
    torch.library.opcheck(torch.ops.swin_moe.window_merge.default, (windows, 2, 4, 6, 2, 3, 1, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "window", "shift", "says"),
    [
        ((1, 5, 4, 2), (2, 2), (0, 0), "multiples of the window"),
        ((1, 4, 4, 2), (2, 2), (2, 0), "less than the window"),
        ((1, 4, 4, 2), (2, 2), (0, -1), "at least 0"),
        ((1, 4, 4, 2), (0, 2), (0, 0), "window"),
        ((4, 4, 2), (2, 2), (0, 0), "(B, H, W, C)"),
    ],
)
def test_says_what_is_not_allowed(shape, window, shift, says, device):
    x = torch.zeros(shape, device=device)
    with pytest.raises(ValueError) as error:
        window_partition(x, window=window, shift=shift)
    assert says in str(error.value)


@pytest.mark.parametrize("device", DEVICES)
def test_windows_of_another_map_are_refused(device):
    with pytest.raises(ValueError, match="windows must be"):
        window_merge(torch.zeros(3, 4, 2, device=device), batch=1, height=4, width=4, window=(2, 2))


@pytest.mark.skipif(not extension.available("cpu"), reason="the compiled kernels were not built")
def test_the_kernel_is_the_compiled_one():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("swin_moe::window_partition", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("swin_moe::window_merge", "CPU")

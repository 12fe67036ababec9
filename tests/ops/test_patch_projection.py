"""A projection of patches: the convolution, with gradients that are nearer to its sums, on every number of threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.layers import PatchEmbed
from swin_moe.ops import linear, row_products
from swin_moe.ops.linear import patch_projection

pytestmark = pytest.mark.skipif(
    "cpu" not in linear.PATCHES_COMPILED or not row_products._has_kernels(),
    reason="this build or processor has no such kernels",
)
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
# images, channels, height, width, outputs, patch; what is beside the last patch takes no part
SHAPES = [
    (2, 3, 16, 24, 20, (4, 4)),
    (3, 1, 13, 11, 7, (2, 3)),
    (1, 3, 8, 8, 16, (8, 8)),
    (70, 3, 32, 32, 16, (4, 4)),  # of more patches than are cut out at once
    (2, 5, 9, 230, 4, (1, 2)),
    (0, 3, 8, 8, 16, (4, 4)),
]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given(shape, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Returns image, weight and bias, and the gradient of the result."""
    images, channels, height, width, outputs, (h, w) = shape
    image, bias = draw(images, channels, height, width, seed=0, dtype=dtype), draw(outputs, seed=2, dtype=dtype)
    weight = draw(outputs, channels, h, w, seed=1, dtype=dtype)
    return [image, weight, bias], draw(images, outputs, height // h, width // w, seed=3, dtype=dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_convolution(shape, dtype):
    tensors, grad = given(shape, dtype)
    mine, exact = ([t.to(kind).requires_grad_() for t in tensors] for kind in (dtype, torch.float64))
    y, expected = patch_projection(*mine), F.conv2d(*exact, stride=shape[-1])
    assert type(y.grad_fn).__name__ == "_PatchProjectionBackward"
    assert torch.equal(y, F.conv2d(*tensors, stride=shape[-1]))
    gradients = torch.autograd.grad(expected, exact, grad.double())
    for got, want in zip(torch.autograd.grad(y, mine, grad), gradients, strict=True):
        assert got.shape == want.shape and got.dtype == dtype and error(got, want) < BOUNDS[dtype]
    channels_last = [t.detach().to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in mine]
    leaves = [t.detach().requires_grad_() for t in channels_last]
    again = torch.autograd.grad(patch_projection(*leaves), leaves, grad.to(memory_format=torch.channels_last))
    assert all(error(got, want) < BOUNDS[dtype] for got, want in zip(again, gradients, strict=True))


def test_only_what_is_asked_for_gets_a_gradient():
    (image, weight, bias), grad = given(SHAPES[0], torch.float32)
    found = torch.autograd.grad(patch_projection(image, weight.requires_grad_(), bias), weight, grad)
    without = torch.autograd.grad(patch_projection(image, weight, None), weight, grad)
    assert torch.equal(*found, *without)
    frozen = patch_projection(image.requires_grad_(), weight.detach(), bias)
    assert type(frozen.grad_fn).__name__ == "ConvolutionBackward0"


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_same_bits_on_every_number_of_threads(dtype):
    (image, weight, _), grad = given((9, 3, 96, 96, 48, (4, 4)), dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(torch.ops.swin_moe.patch_projection_backward(grad, image, weight, [True, True]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_an_embedding_under_autocast_and_with_hooks():
    embed, x = PatchEmbed((4, 4), 3, 24, norm=True), draw(2, 3, 18, 16, seed=0)
    plain = nn.Conv2d(3, 24, 4, stride=4)
    plain.load_state_dict(embed.proj.state_dict())
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y = embed(x)
            expected = embed.norm(plain(F.pad(x, (0, 0, 0, 2))).permute(0, 2, 3, 1))
        assert torch.equal(y, expected)
        found, wanted = (
            torch.autograd.grad(o.float().sum(), [*m.parameters()]) for o, m in ((y, embed.proj), (expected, plain))
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if mixed else 1e-4, atol=1e-2 if mixed else 1e-5)
    called = []
    embed.proj.register_forward_hook(lambda *a: called.append(1))
    embed(x)
    assert called == [1]


def test_it_keeps_the_contract_of_an_operator():
    (image, weight, _), grad = given(SHAPES[0], torch.float32)
    verb = torch.ops.swin_moe.patch_projection_backward
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(verb, (grad, image, weight, needs))
    with pytest.raises(ValueError, match=r"grad must be \(images, outputs, rows, columns\), image"):
        verb(grad[:1], image, weight, [True, True])
    with pytest.raises(TypeError, match="grad and image must be of one type, got Float and BFloat16"):
        verb(grad, image.bfloat16(), weight, [True, True])

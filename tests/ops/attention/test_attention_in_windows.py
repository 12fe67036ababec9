"""All implementations of window attention compute the same values and gradients."""

import pytest
import torch

from swin_moe.ops.attention.in_windows import IMPLEMENTATIONS, attend_windows, choose

IMAGES, MASKS, TOKENS, HEADS, DIM = 2, 3, 9, 2, 8


def arguments(scores: str, masked: bool, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], dict]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(IMAGES * MASKS, TOKENS, 3 * DIM, generator=generator, dtype=dtype)
    bias = torch.randn(HEADS, TOKENS, TOKENS, generator=generator, dtype=dtype)
    # The second head is above the clamp at log 100: its gradient is zero.
    logit_scale = torch.tensor([1.0, 9.0], dtype=dtype).view(HEADS, 1, 1)
    mask = torch.randn(MASKS, TOKENS, TOKENS, generator=generator, dtype=dtype) if masked else None
    inputs = [t.requires_grad_() for t in ([qkv, bias, logit_scale] if scores == "cosine" else [qkv, bias])]
    return inputs, {"mask_MNN": mask, "scale": 0.3, "logit_scale": logit_scale if scores == "cosine" else None}


def slow(qkv: torch.Tensor, bias: torch.Tensor, *, mask_MNN, scale, logit_scale) -> torch.Tensor:
    """Returns the output window by window and head by head, as the formula reads."""
    out = torch.empty(*qkv.shape[:2], DIM, dtype=qkv.dtype)
    width = DIM // HEADS
    for window in range(len(qkv)):
        for head in range(HEADS):
            q, k, v = (qkv[window, :, part * DIM + head * width :][:, :width] for part in range(3))
            if logit_scale is None:
                scores = q @ k.T * scale
            else:
                scores = (q / q.norm(dim=1, keepdim=True)) @ (k / k.norm(dim=1, keepdim=True)).T
                scores = scores * logit_scale[head].exp().clamp(max=100.0)
            scores = scores + bias[head] + (0 if mask_MNN is None else mask_MNN[window % MASKS])
            out[window, :, head * width :][:, :width] = scores.softmax(-1) @ v
    return out


@pytest.mark.parametrize("scores", ["dot", "cosine"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients_equal_the_formula(scores, masked, implementation):
    inputs, options = arguments(scores, masked)
    expected = slow(*inputs[:2], **options)
    weight = torch.arange(1.0, DIM + 1, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weight).square().sum(), inputs)
    ours = attend_windows(*inputs[:2], **options, implementation=implementation)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad((ours * weight).square().sum(), inputs), gradients)
    with torch.no_grad():
        torch.testing.assert_close(attend_windows(*inputs[:2], **options, implementation=implementation), expected)


@pytest.mark.parametrize("scores", ["dot", "cosine"])
def test_analytic_gradients_pass_gradcheck(scores):
    inputs, options = arguments(scores, masked=True)
    del options["logit_scale"]
    inputs = inputs[:2] + [torch.tensor([1.0, 2.0], dtype=torch.float64).view(HEADS, 1, 1).requires_grad_()]

    def attend(qkv, bias, logit_scale):
        factor = logit_scale if scores == "cosine" else None
        return attend_windows(qkv, bias, **options, logit_scale=factor, implementation="analytic")

    assert torch.autograd.gradcheck(attend, inputs if scores == "cosine" else [*inputs[:2], torch.zeros(1)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scores", ["dot", "cosine"])
def test_no_windows_give_zero_gradients(implementation, scores):
    inputs, options = arguments(scores, masked=True)
    inputs[0] = torch.zeros(0, TOKENS, 3 * DIM, dtype=torch.float64, requires_grad=True)
    out = attend_windows(*inputs[:2], **options, implementation=implementation)
    assert out.shape == (0, TOKENS, DIM)
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert not gradient.any()


def test_a_zero_query_is_not_divided_by_zero():
    inputs, options = arguments("cosine", masked=False)
    qkv = inputs[0].detach().clone()
    qkv[0, 0] = 0.0
    for implementation in IMPLEMENTATIONS:
        assert attend_windows(qkv, inputs[1], **options, implementation=implementation).isfinite().all()


def test_half_precision_adds_a_float32_bias_in_float32():
    inputs, options = arguments("dot", masked=True, dtype=torch.float32)
    expected = attend_windows(*inputs, **options)
    with torch.no_grad():
        half = attend_windows(inputs[0].bfloat16(), inputs[1], **options)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected.detach(), rtol=0.05, atol=0.05)


def test_choice_by_device_dtype_and_gradient():
    def chosen(device, dtype, bias, *, gradients):
        return choose(device, dtype, bias, gradients=gradients)

    assert chosen("cpu", torch.float32, torch.float32, gradients=False) == "sdpa"
    assert chosen("cpu", torch.float32, torch.float32, gradients=True) == "analytic"
    assert chosen("cpu", torch.bfloat16, torch.float32, gradients=True) == "reference"
    assert chosen("cpu", torch.float64, torch.float32, gradients=True) == "reference"
    assert chosen("cuda", torch.bfloat16, torch.float32, gradients=True) == "sdpa"


def test_unknown_implementation_is_refused():
    inputs, options = arguments("dot", masked=False)
    with pytest.raises(ValueError, match="implementation must be one of auto, reference, analytic, sdpa, got 'flash'"):
        attend_windows(*inputs, **options, implementation="flash")

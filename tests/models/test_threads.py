"""A training step, and inference, on 1, 2 and 3 threads: every number has the same bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swin_moe
from swin_moe.models.network import Network
from swin_moe.ops import row_products
from tests.models.reference import TINY

# With AVX2 alone single float32 products are MKL's, whose sums threads share.
pytestmark = pytest.mark.skipif(
    not row_products._has_kernels() or not row_products.is_few(1, torch.float32),
    reason="this build or processor has no kernels for single products",
)
THREADS = (1, 2, 3)
# What runs in the kernels for few rows, and what is large enough for other products, and for PyTorch to share its sums.
SIZES = {
    "few rows": (16, 32, {**TINY, "embed_dim": 16}),
    "many rows": (1, 192, {"depths": [1, 1, 1, 1], "num_classes": 100, "window_size": 6}),
}


def build(family: str, size: str) -> tuple[Network, Tensor]:
    batch, side, options = SIZES[size]
    if family == "swin_moe":
        blocks = [[1], [0]] if size == "few rows" else [[], [], [0], [0]]
        options = {**options, "moe_blocks": blocks, "num_experts": 12}
    model = swin_moe.create_model(family, **{**options, "img_size": side, "attention": "fused"})
    return model, torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def step(model: Network, x: Tensor, mixed: bool) -> dict[str, Tensor]:
    """Returns logits, loss and gradients by name."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = model(x)
    logits, aux = out if isinstance(out, tuple) else (out, torch.zeros(()))
    loss = F.cross_entropy(logits.float(), torch.arange(len(x)) % 3, label_smoothing=0.1) + aux
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(loss, parameters)
    return {"logits": logits.detach(), "loss": loss.detach(), **dict(zip(names, gradients))}


def on_each(run) -> list[dict[str, Tensor]]:
    """Returns what a function returns on each number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for number in THREADS:
            torch.set_num_threads(number)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found


def differing(found: list[dict[str, Tensor]]) -> set[str]:
    first, *others = found
    return {name for other in others for name, value in other.items() if not torch.equal(value, first[name])}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
def test_a_step_has_the_same_bits_on_every_number_of_threads(family, size, mixed):
    model, x = build(family, size)
    found = on_each(lambda: step(copy.deepcopy(model).train(), x, mixed))
    assert any("router" in name for name in found[0]) == (family == "swin_moe")
    assert differing(found) == set()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
def test_inference_has_the_same_bits_on_every_number_of_threads(family, size):
    model, x = build(family, size)
    model.eval()
    optimized = {dtype: swin_moe.optimize(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}

    @torch.no_grad()
    def run() -> dict[str, Tensor]:
        found = {f"optimized, {dtype}": network(x) for dtype, network in optimized.items()}
        for mixed in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                found[f"eager, mixed {mixed}"] = model(x)
        return {name: out[0] if isinstance(out, tuple) else out for name, out in found.items()}

    assert differing(on_each(run)) == set()

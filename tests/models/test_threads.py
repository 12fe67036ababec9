"""A training step on 1, 2 and 3 threads: everything has the same bits but what PyTorch sums by thread."""

import copy
import re

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
# The gradients of a convolution.
BY_THREAD = re.compile(r"patch_embed\.proj\.(weight|bias)")


def step(model: Network, mixed: bool) -> dict[str, Tensor]:
    """Returns logits, loss and gradients by name."""
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = model(x)
    logits, aux = out if isinstance(out, tuple) else (out, torch.zeros(()))
    loss = F.cross_entropy(logits.float(), torch.arange(16) % 3) + aux
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(loss, parameters)
    return {"logits": logits.detach(), "loss": loss.detach(), **dict(zip(names, gradients))}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
def test_a_step_has_the_same_bits_on_every_number_of_threads(family, mixed):
    experts = {"moe_blocks": [[1], [0]], "num_experts": 4} if family == "swin_moe" else {}
    model = swin_moe.create_model(family, **{**TINY, **experts, "embed_dim": 16, "attention": "fused"}).train()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(step(copy.deepcopy(model), mixed))
    finally:
        torch.set_num_threads(threads)
    assert any("router" in name for name in found[0]) == bool(experts)
    for other in found[1:]:
        differing = [name for name, value in other.items() if not torch.equal(value, found[0][name])]
        assert all(BY_THREAD.fullmatch(name) for name in differing), differing
        for name in differing if not mixed else []:  # the convolution sums bfloat16 in bfloat16
            assert float((other[name] - found[0][name]).norm() / found[0][name].norm()) < 1e-5, name

"""torch.compile by the user's own hand: one graph in training, with new draws in every step."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from swin_moe.config.io import load_config
from swin_moe.models import build_model
from swin_moe.randomness import RandomContext
from tests.training.cases import TINY

DENSE = "model.moe.blocks=[[-1],[-1]]"
MODELS = {"swin": (DENSE,), "swinv2": (DENSE, "model.name=swinv2"), "swin_moe": ("model.moe.dropout=0.1",)}


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(*options: str) -> torch.nn.Module:
    model = build_model(load_config("digits_swin_moe", [*TINY, "model.drop_path_rate=0.5", *options]).model)
    model.init_weights(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.5)  # SwinV2 starts with branches that add nothing, where no drop shows
    return model.train()


def outputs(network) -> torch.Tensor:
    """Returns what four training steps without a context of their own put out, (4, B, classes)."""
    torch.manual_seed(5)
    images = torch.linspace(-1, 1, 4 * 3 * 16 * 16).reshape(4, 3, 16, 16)
    found = []
    for _ in range(4):
        out = network(images)
        out = out if isinstance(out, torch.Tensor) else out[0]
        out.square().mean().backward()
        found.append(out.detach())
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_serves_every_step(name):
    model = build(*MODELS[name])
    eager = outputs(model)
    assert (eager[0] != eager[1]).any()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = outputs(torch.compile(model, backend=counter))  # fullgraph would capture int(seed), and hide a break
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_a_fresh_context_takes_one_draw_of_torch():
    torch.manual_seed(3)
    expected = int(torch.randint(0, 2**31 - 1, (), device="cpu"))
    torch.manual_seed(3)
    assert RandomContext.fresh(2, torch.device("cpu")).seed == expected

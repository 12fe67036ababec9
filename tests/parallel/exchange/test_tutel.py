"""The adapter to Tutel: its verbs do what ours do, and what is wrong in Tutel is blocked.

Where Tutel is not importable, only a stand-in with its signatures and defects takes its place (tutel_stand_in.py).
"""

import atexit
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swin_moe.config import MoEConfig, ParallelConfig
from swin_moe.moe.dispatch import VERBS, PaddedDispatcher, make_padded_order, padded_rows
from swin_moe.moe.layer import MoELayer
from swin_moe.moe.routing import route
from swin_moe.parallel.apply import parallelize
from swin_moe.parallel.exchange.tutel import CHANGES_NUMERICS, tutel, tutel_verbs
from swin_moe.parallel.groups import single_process_groups
from swin_moe.randomness import RandomContext
from tests.parallel.exchange import tutel_stand_in

EXPERTS, DIM = 5, 6
ROUTINGS = {
    "top-1": {"top_k": 1, "capacity": 3},
    "top-2, groups": {"top_k": 2, "capacity": 2, "group_size": 4},
    "top-3 by confidence": {"top_k": 3, "capacity": 4, "batch_prioritized": True, "normalize_gate": True},
    "by need and confidence": {"top_k": 2, "capacity": None, "batch_prioritized": True},
    "every expert": {"top_k": EXPERTS, "capacity": 7},
    "no slots": {"top_k": 2, "capacity": 0},
}


@pytest.fixture(params=["stand-in", "real"])
def installed(request, monkeypatch):
    """Tutel, as `import tutel.moe` finds it."""
    if request.param == "real":
        if not tutel_stand_in.is_importable():
            pytest.skip("Tutel is not importable")
        return sys.modules["tutel.moe"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tutel"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in tutel_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["tutel.moe"]


def verbs_of(installed):
    return tutel_verbs(installed.fast_encode, installed.fast_decode, EXPERTS)


def travelled(verbs, x, logits, options, extra_rows=1):
    """Returns what verbs make of tokens and of the same rows scaled, and the gradients of x and logits."""
    x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
    routing = route(logits, **options)
    order = make_padded_order(routing, padded_rows(routing) + extra_rows)
    rows = verbs.take(x, order)
    assert rows.shape == (order.num_rows, x.shape[1]) and rows.dtype == x.dtype
    y = verbs.combine((rows * torch.linspace(1, 2, len(rows))[:, None]).to(x.dtype), routing.gate, order)
    seen = torch.arange(y.numel()).view(y.shape).cos()
    (y * seen).sum().backward()
    rows = rows.masked_fill(order.vacant[:, None], 0)
    return {"rows": rows, "y": y, "x": x.grad, "logits": logits.grad}


def compare(verbs, x, logits, options, **tolerance):
    extra_rows = tolerance.pop("extra_rows", 1)
    found = travelled(verbs, x, logits, options, extra_rows)
    expected = travelled(VERBS, x, logits, options, extra_rows)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    return found


def numbers(seed, tokens, width, dtype=torch.float32):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("extra_rows", [0, 1])
@pytest.mark.parametrize("tokens", [0, 1, 12])
@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_verbs_do_what_ours_do(installed, options, tokens, extra_rows):
    """Also without tokens, which Tutel divides by, and without slots, which it cannot reshape."""
    if tokens < options.get("group_size", 1):
        options = {**options, "group_size": None}
    x, logits = numbers(1, tokens, DIM), numbers(2, tokens, EXPERTS)
    compare(verbs_of(installed), x, logits, options, rtol=1e-6, atol=1e-6, extra_rows=extra_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_go_through_float32(installed, dtype):
    """Tutel's float16 kernels need an even number of channels, and its kernels are cached without their type."""
    x, logits = numbers(1, 12, 7, dtype), numbers(2, 12, EXPERTS)
    found = compare(verbs_of(installed), x, logits, ROUTINGS["top-2, groups"], rtol=1e-6, atol=1e-5)
    assert found["y"].dtype == torch.float32


def test_a_layout_that_is_not_contiguous_is_no_matter(installed):
    x, logits = numbers(1, DIM, 12).t(), numbers(2, 12, EXPERTS)
    assert not x.is_contiguous()
    compare(verbs_of(installed), x, logits, ROUTINGS["top-1"], rtol=1e-6, atol=1e-6)


def test_by_need_and_confidence_drops_nothing(installed):
    """Tutel's own routing takes the need from the wrong row and drops tokens, 57 of 512 in one try."""
    x, logits = torch.ones(128, DIM), numbers(3, 128, 8)
    routing = route(logits, top_k=1, capacity=None, batch_prioritized=True)
    order = make_padded_order(routing, padded_rows(routing))
    verbs = tutel_verbs(installed.fast_encode, installed.fast_decode, 8)
    y = verbs.combine(verbs.take(x, order), torch.ones(128, 1), order)
    assert torch.equal(y, x)


def test_float64_is_refused(installed):
    with pytest.raises(ValueError, match="backend=tutel computes in float32 and would round float64; choose model.moe"):
        compare(verbs_of(installed), numbers(1, 4, DIM).double(), numbers(2, 4, EXPERTS), ROUTINGS["top-1"])


def build_layer(**options):
    config = MoEConfig(num_experts=4, top_k=2, capacity_factor=1.0, backend="tutel", **options)
    layer = MoELayer(DIM, 8, config, fc2_bias=True, layer=0, init_std=0.5)
    layer.init_weights(0, "layer")
    return layer


def test_a_layer_of_one_rank_uses_it(installed):
    layer = build_layer(dropout=0.3)
    x = numbers(1, 8, DIM).view(2, 4, DIM)
    random = RandomContext(1, 2, torch.arange(2))
    expected = layer(x, random)[0]
    parallelize(layer, ParallelConfig(), single_process_groups())
    assert isinstance(layer.dispatcher, PaddedDispatcher) and layer.dispatcher.verbs is not VERBS
    torch.testing.assert_close(layer(x, random)[0], expected, rtol=1e-6, atol=1e-6)


def test_weights_are_ours_and_loaded_strictly(installed):
    """Tutel's loader fills missing expert weights with zeros and takes a transposed one, both without an error."""
    layer = parallelize(build_layer(), ParallelConfig(), single_process_groups())
    state = layer.state_dict()
    assert sorted(state) == [
        "experts.fc1_bias",
        "experts.fc1_weight",
        "experts.fc2_bias",
        "experts.fc2_weight",
        "router.weight",
    ]
    with pytest.raises(RuntimeError, match="Missing key.*experts.fc1_weight"):
        layer.load_state_dict({name: value for name, value in state.items() if name != "experts.fc1_weight"})
    with pytest.raises(RuntimeError, match="size mismatch for experts.fc1_weight"):
        layer.load_state_dict(state | {"experts.fc1_weight": state["experts.fc1_weight"].transpose(1, 2)})


@pytest.mark.parametrize("name", CHANGES_NUMERICS)
def test_variables_that_change_numerics_are_refused(installed, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"backend=tutel: Tutel computes something else where {name} is set in the en"):
        tutel(single_process_groups(), 4, None)


def test_nothing_is_registered_to_run_at_exit(installed):
    before = atexit._ncallbacks()
    layer = parallelize(build_layer(), ParallelConfig(), single_process_groups())
    layer(numbers(1, 8, DIM)[None])[0].sum().backward()
    assert atexit._ncallbacks() == before


def test_a_failed_process_exits_with_its_own_status():
    """Under Tutel's system module it exits with 0."""
    program = f"""
import sys
from tests.parallel.exchange import test_tutel
from tests.parallel.exchange import tutel_stand_in
tutel_stand_in.install_if_missing()
layer = test_tutel.build_layer()
test_tutel.parallelize(layer, test_tutel.ParallelConfig(), test_tutel.single_process_groups())
layer(test_tutel.numbers(1, 8, {DIM})[None])[0].sum().backward()
sys.exit(3)
"""
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, stderr=subprocess.DEVNULL).returncode == 3


def test_a_missing_tutel_is_explained(monkeypatch):
    for name in ("tutel", "tutel.moe"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"NO_CUDA=1 .* NO_NCCL=1") as caught:
        tutel(single_process_groups(), 4, None)
    assert "pip install --no-build-isolation 'swin-moe[tutel]'" in str(caught.value)
    assert "git+https://github.com/microsoft/tutel@main" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tutel_without_its_compiled_part_is_explained_too(monkeypatch):
    modules = tutel_stand_in.modules()
    del modules["tutel.moe"].fast_encode  # `from tutel.moe import` then fails as it does without the extension
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match=r"which cannot be imported \(cannot import name 'fast_encode'"):
        tutel(single_process_groups(), 4, None)

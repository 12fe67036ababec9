"""swin_moe.optimize gives what the network gives in evaluation: every family, image size, batch, dtype, threads."""

import copy

import pytest
import torch
from torch import Tensor, nn

import swin_moe
from swin_moe.config.variants import VARIANTS
from swin_moe.ops.packed_layers import DTYPES, refusal
from tests.models.reference import TINY, fill_by_rank

pytestmark = pytest.mark.skipif(bool(refusal()), reason=f"no packed layers here: {refusal()}")

# Relative error of logits and maps; in 16 bits what rounding the factors of all products costs.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
EXPERTS = {"moe_blocks": [[1], [0]], "num_experts": 4}
OPTIONS = {
    "top_k": {**EXPERTS, "top_k": 2, "normalize_gate": True, "capacity_factor": 1.25},
    "cosine": {**EXPERTS, "router": "cosine", "shared_experts": 1},
    "sigmoid": {**EXPERTS, "scores": "sigmoid", "bias_rate": 1e-3, "balance_loss": "none", "top_k": 2},
    "expert_choice": {**EXPERTS, "choice": "expert", "balance_loss": "none"},
    "soft": {**EXPERTS, "choice": "soft", "slots": 4, "balance_loss": "none"},
    "padded": {**EXPERTS, "backend": "padded"},
    "ape": {"ape": True, "patch_norm": False, "qkv_bias": False, "mlp_fc2_bias": False},
    "extra": {"extra_norm_every": 1, "num_classes": 0},
    "rectangle": {"img_size": (24, 40), "patch_size": (2, 4), "in_chans": 1},
}


def build(family: str, **options) -> nn.Module:
    model = swin_moe.create_model(family, **{**TINY, "embed_dim": 16, **options}).double()
    fill_by_rank(model)
    for name, parameter in model.named_parameters():
        if name.endswith("balance.bias"):  # large enough to change who is chosen
            parameter.data = torch.linspace(-2.0, 2.0, len(parameter), dtype=parameter.dtype)
    return model.eval()


def image(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randn(
        (batch, channels, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out[0] if isinstance(out, tuple) else out


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", VARIANTS)
def test_logits_and_maps_are_the_networks(family, dtype):
    model = build(family)
    optimized = swin_moe.optimize(model, dtype=dtype)
    for batch, height, width in ((1, 32, 32), (3, 40, 24), (8, 33, 61), (0, 32, 32), (1, 5, 70)):
        x = image(batch, height, width)
        got, expected = optimized(x), logits_of(model, x)
        assert got.shape == expected.shape and not got.requires_grad
        assert not batch or relative(got, expected) < BOUNDS[dtype]
    with torch.no_grad():
        expected_maps = model.forward_features(x)
    for got, expected in zip(optimized.forward_features(x), expected_maps, strict=True):
        assert got.shape == expected.shape and relative(got, expected) < BOUNDS[dtype]
    (last,) = optimized.forward_features(x, [1])
    assert torch.equal(last, got)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_the_networks(name):
    model = build("swin", **OPTIONS[name])
    optimized = swin_moe.optimize(model, dtype=torch.float64)
    for batch, height, width in ((2, *model.img_size), (3, 21, 34)):
        x = image(batch, height, width, model.config.in_chans)
        assert relative(optimized(x), logits_of(model, x)) < BOUNDS[torch.float64]


@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
def test_threads_and_the_rest_of_the_batch_change_no_bit(family):
    options = EXPERTS if family == "swin_moe" else {}
    for dtype in (torch.float32, torch.bfloat16):
        optimized = swin_moe.optimize(build(family, **options), dtype=dtype)
        x = image(5, 40, 56)
        alone = optimized(x)
        torch.set_num_threads(3)
        try:
            assert torch.equal(optimized(x), alone)
        finally:
            torch.set_num_threads(1)
        if not options:  # the head's product is PyTorch's, which may sum one row in another order than five
            torch.testing.assert_close(optimized(x[3:4]), alone[3:4])


def test_bfloat16_is_as_near_as_autocast():
    model = build("swinv2").float()
    x = image(4, 32, 32).float()
    exact = logits_of(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = relative(logits_of(model, x), exact)
    assert relative(swin_moe.optimize(model, dtype=torch.bfloat16)(x), exact) < 1.5 * eager


def test_the_model_stays_and_is_not_needed():
    model = build("swinv2", num_experts=4, moe_blocks=[[-1], [1]]).float()
    before = copy.deepcopy(model.state_dict())
    x = image(2, 32, 32).float()
    optimized = swin_moe.optimize(model)
    expected = optimized(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(optimized(x), expected)
    assert not list(optimized.parameters()) and not optimized.state_dict()


def test_what_cannot_be_optimized_is_said():
    model = build("swin").float()

    def refused(network: nn.Module, sentence: str, **options) -> None:
        with pytest.raises(ValueError, match=f"^optimize: {sentence}"):
            swin_moe.optimize(network, **options)

    refused(nn.Linear(2, 2), "it takes a Swin network as build_model and create_model give it, got a Linear")
    refused(model, r"dtype must be one of .*, got torch.int8", dtype=torch.int8)
    with torch.device("meta"):
        refused(swin_moe.create_model("swin", **TINY), ".*patch_embed.proj.weight is on meta")
    handle = model.layers[0].blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    refused(model, "layers.0.blocks.0.mlp.fc1 has hooks")
    handle.remove()
    model.layers[0].blocks[0].attn.proj = nn.Sequential(nn.Linear(16, 16))
    refused(model, "layers.0.blocks.0.attn has a Sequential for its proj, which is not a Linear")
    model = build("swin").float()
    model.patch_embed = Wrapped(8, 8)
    refused(model, r"patch_embed \(Wrapped\) is none of the parts that a Swin network is built of")
    refused(build("swin", embed_dim=256, num_heads=(2, 2)), "layers.0.blocks.0.attn: 128 channels a head are not in")


class Wrapped(nn.Linear):
    """A linear layer of someone else's."""


def test_it_is_not_saved_and_is_its_own_copy(tmp_path):
    optimized = swin_moe.optimize(build("swin"), int8=True)
    with pytest.raises(TypeError, match="packed for this processor and is not saved; save the model it is made of"):
        torch.save(optimized, tmp_path / "optimized.pt")
    assert copy.deepcopy(optimized) is optimized


def test_wrong_images_are_refused_as_the_network_refuses_them():
    optimized = swin_moe.optimize(build("swin").float())
    for wrong, sentence in (
        (torch.zeros(3, 32, 32), "one image needs a batch of one"),
        (torch.zeros(1, 4, 32, 32), "takes images of shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images of its own type"),
        (torch.zeros(1, 3, 32, 32, device="meta"), "an optimized network takes images on the CPU, got one on meta"),
    ):
        with pytest.raises(ValueError, match=sentence):
            optimized(wrong)
    with pytest.raises(TypeError, match="takes a tensor"):
        optimized("image.png")
    with pytest.raises(ValueError, match=r"stages must be in \[0, 1\], got 2"):
        optimized.forward_features(torch.zeros(1, 3, 32, 32), [2])

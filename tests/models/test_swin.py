"""The network beyond the recorded outputs: any size, empty batches, recomputation, randomness, windows, precision."""

import pytest
import torch
import torch.nn.functional as F

from swin_moe import create_model
from swin_moe.config.variants import VARIANTS
from swin_moe.ops.attention.geometry import relative_position_index, shift_mask
from swin_moe.ops.random_draws import drop_path_factors
from swin_moe.randomness import RandomContext
from tests.models.reference import SMALL, TINY, fill_by_rank, gradient_norms, slow_v1_block

MOE = {"moe_blocks": [[-1], [1]], "num_experts": 4, "moe_drop": 0.1}
DROPS = {"drop_rate": 0.2, "attn_drop_rate": 0.3, "drop_path_rate": 0.4}


def tiny(family: str, **arguments) -> torch.nn.Module:
    """Returns a model whose every parameter matters (SwinV2 starts as an identity)."""
    model = create_model(family, **{**TINY, **arguments}).double()
    fill_by_rank(model)
    return model


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def context(*samples: int) -> RandomContext:
    return RandomContext(seed=3, step=7, sample=torch.tensor(samples, dtype=torch.int64))


def logits_of(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 9), (3, 5), (9, 4)])
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_on_any_map_equals_token_by_token_attention(height, width, index):
    block = tiny("swin").eval().layers[0].blocks[index]
    x = image(1, height, width, 8)
    out, aux = block(x, None, False)
    assert aux is None
    torch.testing.assert_close(out[0], slow_v1_block(block, x[0], shift=2 * index))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 9)])
@pytest.mark.parametrize("shift", [0, 2])
def test_spatial_mlp_equals_the_grouped_convolution_on_padded_windows(height, width, shift):
    mixer = tiny("swin_mlp").layers[0].blocks[1].spatial_mlp
    x = image(2, height, width, 8)
    padded = F.pad(x, (0, 0, 0, -width % 4, 0, -height % 4))
    before, after = (4 - shift, shift) if shift else (0, 0)
    padded = F.pad(padded, (0, 0, before, after, before, after))
    expected = torch.empty_like(padded)
    for y in range(0, padded.shape[1], 4):
        for z in range(0, padded.shape[2], 4):
            window = padded[:, y : y + 4, z : z + 4].reshape(2, 16, 2, 4).transpose(1, 2).reshape(2, 32, 4)
            mixed = F.conv1d(window, mixer.weight, mixer.bias, groups=2)
            expected[:, y : y + 4, z : z + 4] = mixed.view(2, 2, 16, 4).transpose(1, 2).reshape(2, 4, 4, 8)
    torch.testing.assert_close(mixer(x, shift=shift), expected[:, before:, before:][:, :height, :width])


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (33, 61), (5, 70)])
def test_any_image_size_gives_a_pyramid(family, size):
    model = tiny(family).eval()
    maps = model.forward_features(image(2, 3, *size))
    height, width = -(-size[0] // 4), -(-size[1] // 4)
    assert [tuple(m.shape) for m in maps] == [(2, 8, height, width), (2, 16, -(-height // 2), -(-width // 2))]
    torch.testing.assert_close(model.head(maps[-1].mean(dim=(2, 3))), model(image(2, 3, *size)))
    torch.testing.assert_close(model.forward_features(image(2, 3, *size), stages=(1,)), maps[1:])


def test_an_image_is_padded_with_zeros_to_whole_patches():
    model = tiny("swin").eval()
    x = image(1, 3, 33, 46)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 2, 0, 3))))


def test_a_map_of_one_window_is_shifted_only_away_from_the_nominal_size():
    block = tiny("swin").layers[1].blocks[1]
    assert block.mixer.window == 4  # the map is 4 x 4 at 32 pixels
    assert (block.shift(nominal=True), block.shift(nominal=False)) == (0, 2)
    assert [b.shift(nominal=True) for b in tiny("swin").layers[0].blocks] == [0, 2]


def test_the_window_shrinks_to_the_smaller_side_of_the_nominal_map():
    model = tiny("swinv2", img_size=(16, 64), window_size=8)
    assert [stage.blocks[0].mixer.window for stage in model.layers] == [4, 2]


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_windows_of_one_position_are_finite(family):
    """The official SwinV2 divides its coordinates by the window less one, and gives NaN."""
    model = tiny(family, window_size=1)
    x = image(2, 3, 32, 32).requires_grad_()
    out = model(x)
    out.square().sum().backward()
    assert out.isfinite().all() and out.std() > 0
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_absolute_positions_are_interpolated_to_other_sizes():
    model = tiny("swin", ape=True).eval()
    out = model(image(1, 3, 40, 24))
    model.grid, model.absolute_pos_embed = (
        (10, 6),
        torch.nn.Parameter(
            F.interpolate(model.absolute_pos_embed.view(1, 8, 8, 8).permute(0, 3, 1, 2), size=(10, 6), mode="bicubic")
            .permute(0, 2, 3, 1)
            .reshape(1, 60, 8)
        ),
    )
    torch.testing.assert_close(model(image(1, 3, 40, 24)), out)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", [*VARIANTS, "swin_moe with experts"])
def test_an_empty_batch_has_zero_gradients(family, training):
    model = tiny(family.split()[0], **(MOE if "experts" in family else {}), **DROPS).train(training)
    out = model(image(0, 3, 40, 24))
    assert logits_of(out).shape == (0, 3)
    (logits_of(out).sum() + (out[1] if isinstance(out, tuple) else 0)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_mlp", "swin_moe with experts"])
def test_recomputation_changes_nothing(family):
    results = []
    for recompute in (False, True):
        experts = MOE if "experts" in family else {}
        model = tiny(family.split()[0], use_checkpoint=recompute, **experts, drop_rate=0.2, drop_path_rate=0.4).train()
        assert model.recompute == ("block" if recompute else "none")
        out = model(image(4, 3, 32, 32), random=context(0, 1, 2, 3))
        (logits_of(out).square().sum() + (out[1] if isinstance(out, tuple) else 0)).backward()
        results.append((logits_of(out), gradient_norms(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("family", VARIANTS)
def test_training_noise_follows_the_sample_not_its_place_in_the_batch(family):
    model = tiny(family, **DROPS).train()
    x, samples = image(4, 3, 40, 24), (10, 11, 12, 13)
    whole = model(x, random=context(*samples))
    halves = [model(x[i : i + 2], random=context(*samples[i : i + 2])) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.cat(halves))
    reversed_order = model(x.flip(0), random=context(*samples[::-1]))
    torch.testing.assert_close(reversed_order.flip(0), whole)
    other_step = model(x, random=RandomContext(3, 8, torch.tensor(samples)))
    assert not torch.allclose(other_step, whole)
    assert not torch.allclose(model(x), model(x))  # a fresh context per forward
    torch.testing.assert_close(model.eval()(x, random=context(*samples)), model(x))


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    model = tiny("swin", drop_path_rate=0.5, depths=[1, 1]).train()
    assert [stage.blocks[0].drop_path for stage in model.layers] == [0.0, 0.5]
    block, x = model.layers[1].blocks[0], image(1, 4, 4, 16).expand(4000, 4, 4, 16)
    random = context(*range(4000))
    factors = drop_path_factors(random, [0.0, 0.5], torch.float32)[:, 1]
    with torch.no_grad():
        out, _ = block(x, random, True, factors)
        evaluated, _ = block(x[:1], None)
    kept = (out != x).flatten(1).any(1).double().mean().item()
    assert kept == pytest.approx(0.75, abs=0.03)  # both branches are dropped in a quarter of the images
    assert (out - x).mean().item() != pytest.approx(0.0, abs=1e-3)
    assert evaluated.shape == (1, 4, 4, 16)


@pytest.mark.parametrize("window", [3, 8])
def test_a_new_window_equals_a_model_built_with_it(window):
    old, new_size = tiny("swinv2").eval(), (64, 64)
    built = tiny("swinv2", window_size=window, img_size=new_size, pretrained_window_sizes=[4, 4]).eval()
    built.load_state_dict(old.state_dict())
    x = image(1, 3, *new_size)
    before = old(image(1, 3, 32, 32))
    old.set_window_size(window, img_size=new_size)
    torch.testing.assert_close(old(x), built(x))
    assert old.flops() == built.flops()
    old.set_window_size(4, img_size=(32, 32))
    torch.testing.assert_close(old(image(1, 3, 32, 32)), before)


def test_a_new_window_resizes_bias_tables():
    model = tiny("swin").eval()
    model.set_window_size(8, img_size=(64, 64))
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.shape == (225, 2)
    assert model(image(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="swin_mlp has weights per token"):
        tiny("swin_mlp").set_window_size(8)
    with pytest.raises(ValueError, match="model.ape"):
        tiny("swin", ape=True).set_window_size(8, img_size=(64, 64))


@pytest.mark.parametrize("family", VARIANTS)
def test_no_features_without_a_head(family):
    model = tiny(family, num_classes=0).eval()
    assert model(image(2, 3, 32, 32)).shape == (2, 16)
    with pytest.raises(ValueError, match=r"stages must be in \[0, 1\], got 2"):
        model.forward_features(image(2, 3, 32, 32), stages=(0, 2))


def test_geometry_is_built_once_per_size():
    model = tiny("swinv2").eval()
    model(image(1, 3, 36, 52))
    built = [cache.cache_info().misses for cache in (shift_mask, relative_position_index)]
    model(image(2, 3, 36, 52))
    assert [cache.cache_info().misses for cache in (shift_mask, relative_position_index)] == built


def test_geometry_made_in_inference_mode_serves_training():
    shift_mask.cache_clear(), relative_position_index.cache_clear()
    model = tiny("swin")
    with torch.inference_mode():
        model.eval()(image(1, 3, 32, 32))
    model.train()(image(1, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("family", VARIANTS)
def test_precision(family):
    model = tiny(family).float().train()
    x, random = image(2, 3, 32, 32).float(), context(0, 1)
    expected = model(x, random=random)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, random=random)
    half.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
    half = model.bfloat16().eval()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    assert tiny(family)(image(1, 3, 32, 32)).dtype == torch.float64


def test_forward_on_meta():
    for family in VARIANTS:
        with torch.device("meta"):
            model = create_model(family, **SMALL)
        assert model.train()(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_extra_norms_stand_on_the_main_branch():
    model = tiny("swinv2", depths=[2, 4], extra_norm_every=2, post_norm_init=1e-5)
    names = [n for n, _ in model.named_parameters() if "enorm" in n]
    blocks = ((0, 1), (1, 1), (1, 3))
    assert names == [f"layers.{s}.blocks.{b}.enorm.{p}" for s, b in blocks for p in ("weight", "bias")]
    block = model.eval().layers[0].blocks[1]
    x = image(1, 8, 8, 8)
    out, norm = block(x)[0], block.enorm
    block.enorm = None
    torch.testing.assert_close(norm(block(x)[0]), out)


def test_experts_give_a_weighted_auxiliary_loss():
    model = tiny("swin_moe", **MOE, aux_loss_weight=0.5).eval()
    out, aux = model(image(2, 3, 32, 32))
    assert out.shape == (2, 3) and aux.shape == ()
    twice = tiny("swin_moe", **MOE, aux_loss_weight=1.0).eval()
    torch.testing.assert_close(twice(image(2, 3, 32, 32))[1], 2 * aux)


@pytest.mark.parametrize("family", VARIANTS)
def test_any_family_takes_experts(family):
    model = tiny(family, **MOE)
    out, aux = model(image(2, 3, 32, 32))
    (out.square().sum() + aux).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_parameters_without_weight_decay():
    assert tiny("swin").no_weight_decay_keywords() == {"relative_position_bias_table"}
    assert tiny("swinv2").no_weight_decay_keywords() == {"relative_position_bias_table", "cpb_mlp", "logit_scale"}
    keywords = tiny("swin_moe", **MOE, cosine_router=True).no_weight_decay_keywords()
    names = [n for n, _ in tiny("swin_moe", **MOE, cosine_router=True).named_parameters() if ".mlp.router." in n]
    assert all(any(k in n for k in keywords) for n in names)
    names = [n for n, _ in tiny("swin_moe", **MOE).named_parameters() if ".mlp.router." in n]
    assert not any(k in n for k in keywords for n in names)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 12])  # 3 images have 12 windows in the first stage: 5 crosses images
@pytest.mark.parametrize("arguments", [{}, DROPS], ids=["no drops", "drops"])
@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
def test_attention_in_turns_changes_nothing(family, arguments, chunk, recompute):
    moe = MOE if family == "swin_moe" else {}
    whole = tiny(family, **arguments, **moe)
    parts = tiny(family, **arguments, **moe, attention_chunk=chunk, use_checkpoint=recompute)
    for x in (image(3, 3, 32, 32), image(1, 3, 50, 38)):  # the second is padded, and its small maps are shifted too
        losses = [logits_of(model(x, random=context(*range(4, 4 + len(x))))).square().sum() for model in (whole, parts)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
        expected, found = (
            torch.autograd.grad(loss, [*m.parameters()], allow_unused=True) for loss, m in zip(losses, (whole, parts))
        )
        for name, a, b in zip(dict(whole.named_parameters()), expected, found):
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        with torch.no_grad():
            a, b = (logits_of(m.eval()(x)) for m in (whole, parts))
        whole.train(), parts.train()
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_attention_in_turns_in_float32():
    whole, parts = (create_model("swinv2", **TINY, attention_chunk=chunk) for chunk in (0, 5))
    fill_by_rank(whole), fill_by_rank(parts)
    x = image(3, 3, 32, 32).float()
    torch.testing.assert_close(parts.eval()(x), whole.eval()(x), rtol=1e-6, atol=1e-6)


def test_attention_in_turns_of_no_image():
    model = tiny("swin_moe", **MOE, attention_chunk=2)
    logits_of(model(image(0, 3, 32, 32), random=context())).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_attention_in_turns_keeps_no_scores_for_backward():
    kept = []
    for chunk in (0, 4):
        storages = {}
        options = {**TINY, "img_size": 128, "window_size": 8, "attention": "reference"}
        model = create_model("swinv2", **options, attention_chunk=chunk)

        def remember(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            model(torch.randn(1, 3, 128, 128))
        kept.append(sum(t.untyped_storage().nbytes() for t in storages.values()))
    scores = 2 * 16 * 2 * 64 * 64 * 4  # bytes: 2 blocks of 16 windows, 2 heads, 64 tokens; the last stage is one turn
    assert kept[0] - kept[1] > 0.9 * scores, kept

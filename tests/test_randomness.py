"""Draws are pure functions of their key, look uniform and normal, and do not repeat along any index."""

import pytest
import torch

from swin_moe.randomness import (
    PURPOSES,
    RandomContext,
    bits,
    derive_key,
    keep_mask,
    normal,
    truncated_normal_,
    uniform,
)

ROWS = torch.arange(2000)


def test_draws_are_pure_and_do_not_depend_on_the_batch():
    key = derive_key(1, 2, 3)
    whole = uniform(key, ROWS, 16)
    torch.testing.assert_close(uniform(key, ROWS[700:900], 16), whole[700:900], rtol=0, atol=0)
    torch.testing.assert_close(uniform(key, ROWS, 8), whole[:, :8], rtol=0, atol=0)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    normal(derive_key(0), ROWS, 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("words", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_uniform_moments_and_correlations(words):
    u = uniform(derive_key(*words), ROWS, 64).double()
    n = u.numel()
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    centred = (u - 0.5) * 12**0.5
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(64, 0), centred.roll(-1, 0).roll(1, 1)):
        assert abs((centred * shifted).mean()) < 5 / n**0.5
    # chi-square over 256 cells: mean 255, standard deviation 22.6
    counts = torch.histc(u, 256, 0, 1)
    chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert 255 - 6 * 22.6 < chi < 255 + 6 * 22.6


def test_keys_steps_layers_and_purposes_are_independent():
    context = RandomContext(7, 3, torch.arange(4))
    keys = [context.key(p, layer) for p in PURPOSES for layer in range(4)]
    keys += [RandomContext(7, step, torch.arange(4)).key("dropout") for step in (4, 5)] + [
        RandomContext(8, 3, ROWS).key("dropout")
    ]
    assert len(set(keys)) == len(keys)
    draws = torch.stack([uniform(k, ROWS, 1)[:, 0] for k in keys]).double()
    off_diagonal = torch.corrcoef(draws) - torch.eye(len(keys))
    assert off_diagonal.abs().max() < 6 / len(ROWS) ** 0.5


def test_normal_moments():
    z = normal(derive_key(5), ROWS, 64).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.999])
def test_keep_mask_probability(drop):
    kept = keep_mask(derive_key(9), ROWS, 64, drop=drop).double()
    assert abs(kept.mean() - (1 - drop)) <= 5 * (drop * (1 - drop) / kept.numel()) ** 0.5


def test_rows_beyond_32_bits_differ():
    rows = torch.tensor([5, 5 + 2**32, 5 + 2**40])
    assert len({tuple(r) for r in bits(derive_key(1), rows, 8).tolist()}) == 3


def test_initial_values_do_not_depend_on_torch():
    """The numbers that torch 2.13 gives, with any torch: one in two is drawn again at this standard deviation."""
    found = torch.empty(40, 3)
    truncated_normal_(found, 3.0, torch.Generator().manual_seed(4))
    expected = torch.tensor([0.883449912071228, -1.0321909189224243, -0.5513081550598145])
    assert torch.equal(found[0], expected) and 1.9 < found.abs().max() <= 2.0
    assert abs(found.var() - 1.14) < 0.4  # 4 / 3 if it were uniform on (-2, 2)
    truncated_normal_(torch.empty(0, 3), 3.0, torch.Generator())
    truncated_normal_(torch.empty(4, 3, device="meta"), 3.0, torch.Generator())


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older ones draw otherwise")
@pytest.mark.parametrize("std", [0.02, 1.0, 3.0])
def test_initial_values_are_those_of_torch(std):
    ours, theirs = torch.empty(50, 20), torch.empty(50, 20)
    truncated_normal_(ours, std, torch.Generator().manual_seed(1))
    torch.nn.init.trunc_normal_(theirs, std=std, a=-2.0, b=2.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours, theirs)

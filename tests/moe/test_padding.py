"""Tokens of padding are not routed: results are those of every image by itself, whatever stands beside it."""

from dataclasses import replace

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.moe import MoELayer
from swin_moe.moe.routing import are_even, image_shares, join, route, uneven_parts
from swin_moe.randomness import RandomContext

CONFIG = MoEConfig(blocks=((0,),), num_experts=4, top_k=2, capacity_factor=0.6, capacity_scope="images", group_images=1)
CASES = {
    "capacity": CONFIG,
    "two images a group": replace(CONFIG, group_images=2),
    "gshard": replace(CONFIG, balance_loss="gshard", z_loss_weight=0.1),
    "experts choose": replace(CONFIG, choice="expert", top_k=1, capacity_factor=1.0, balance_loss="none"),
    "by need": replace(CONFIG, capacity_factor=0.0),
    "padded rows": replace(CONFIG, backend="padded"),
    "shared": replace(CONFIG, shared_experts=1, dropout=0.3),
    "a rank's tokens": replace(CONFIG, capacity_scope="rank", group_images=0),
}
COUNTS = (7, 12, 4, 9)  # tokens of each image, of 12


def layer_of(config: MoEConfig) -> MoELayer:
    layer = MoELayer(6, 8, config, fc2_bias=True, layer=0, init_std=0.5).double()
    layer.init_weights(0, "layer")
    return layer


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(12)[None] < torch.tensor(COUNTS)[:, None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing_and_gets_nothing(case, training):
    layer = layer_of(CASES[case]).train(training)
    x, valid = inputs()
    random = RandomContext(1, 2, torch.tensor([3, 0, 7, 5])) if training else None
    y, aux = layer(x, random, valid)
    assert torch.equal(y[~valid], torch.zeros_like(y[~valid])) and y[valid].abs().sum() > 0
    other, other_aux = layer(torch.where(valid[..., None], x, 100.0), random, valid)
    assert torch.equal(y, other) and torch.equal(aux, other_aux)
    assert int(layer.stats.demand.sum()) <= sum(COUNTS) * 4


@pytest.mark.parametrize("case", ["capacity", "gshard", "experts choose", "by need", "padded rows"])
def test_an_image_is_routed_as_by_itself(case):
    """Without noise, which depends on a token's place in the padded map; routing groups are single images."""
    layer = layer_of(CASES[case]).eval()
    if case != "experts choose":
        layer.config = layer.choice.config = replace(CASES[case], eval_capacity_factor=None)
    x, valid = inputs()
    y, aux = layer(x, valid_BL=valid)
    total = 0.0
    for image, count in enumerate(COUNTS):
        alone, alone_aux = layer(x[image : image + 1, :count])
        torch.testing.assert_close(y[image, :count], alone[0])
        total = total + alone_aux / len(COUNTS)
    torch.testing.assert_close(aux, total)


def test_all_tokens_valid_is_no_mask():
    layer = layer_of(CONFIG).train()
    x, valid = inputs()
    random = RandomContext(1, 2, torch.arange(4))
    for a, b in zip(layer(x, random), layer(x, random, torch.ones_like(valid))):
        torch.testing.assert_close(a, b)


def test_gradients_reach_the_images_alone():
    layer = layer_of(CONFIG).train()
    x, valid = inputs()
    x.requires_grad_()
    y, aux = layer(x, RandomContext(1, 2, torch.arange(4)), valid)
    (y.square().sum() + aux).backward()
    assert x.grad is not None and torch.equal(x.grad[~valid], torch.zeros_like(x.grad[~valid]))
    assert x.grad[valid].abs().sum() > 0


def test_groups_of_unequal_size_join_as_one():
    """Kept pairs come first in every expert, group by group; the dropped ones follow; each slot is taken once."""
    assert uneven_parts((3, 0, 5), 1) == [(3, 3), (5, 5)] and uneven_parts((), 2) == uneven_parts((0, 0), 1) == [(0, 1)]
    assert uneven_parts((3, 4, 5), 2) == [(7, 7), (5, 5)] and image_shares((3, 4, 5), 2) == [2 / 3, 1 / 3]
    assert are_even([(8, 4), (3, 3)]) and not are_even([(3, 3), (5, 5)]) and not are_even([(5, 5), (3, 3), (5, 5)])
    torch.manual_seed(0)
    logits = [torch.randn(size, 3) for size in (5, 9, 4)]
    groups = [route(x, top_k=2, capacity=3) for x in logits]
    joined = join(groups)
    assert joined.group_size == 18 and joined.capacity == 9
    assert torch.equal(joined.keep, torch.cat([r.keep for r in groups]))
    assert torch.equal(joined.demand[0], sum(r.demand[0] for r in groups))
    for expert in range(3):
        mine = joined.expert == expert
        assert sorted(joined.slot[mine].tolist()) == list(range(int(joined.demand[0, expert])))
        kept = joined.slot[mine & joined.keep]
        assert sorted(kept.tolist()) == list(range(int(joined.kept[0, expert])))
        first = joined.slot[:5][mine[:5] & joined.keep[:5]]
        assert sorted(first.tolist()) == list(range(int(groups[0].kept[0, expert])))

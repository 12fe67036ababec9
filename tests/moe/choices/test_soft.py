"""Soft MoE: weights by hand, the routing of slots, and the layer against a loop over slots."""

import torch

from swin_moe.moe.choices.soft import SoftMix, route_slots
from tests.moe.reference import soft_slowly
from tests.moe.test_layer import DIM, build, images, weights


def test_by_hand():
    # Two tokens, two slots: weights 3:1 and 1:1 over tokens, 3:1 and 1:1 over slots.
    mix = SoftMix.of(torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]).log())
    x = torch.tensor([[4.0], [8.0]])
    torch.testing.assert_close(mix.slots(x), torch.tensor([[0.75 * 4 + 0.25 * 8], [0.5 * 4 + 0.5 * 8]]))
    y = torch.tensor([[100.0], [20.0]])
    torch.testing.assert_close(mix.tokens(y), torch.tensor([[0.75 * 100 + 0.25 * 20], [0.5 * 100 + 0.5 * 20]]))


def test_every_slot_goes_to_its_own_expert():
    routing = route_slots(2, 3, 2, like=torch.zeros(1))
    assert routing.expert.flatten().tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert routing.slot.flatten().tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    assert routing.demand.tolist() == [[4, 4, 4]] and routing.capacity == 4 and bool(routing.keep.all())
    assert route_slots(0, 3, 2, like=torch.zeros(1)).demand.tolist() == [[0, 0, 0]]


def test_the_layer_equals_a_loop_over_slots():
    for router in ("linear", "cosine"):
        layer = build(choice="soft", balance_loss="none", slots=3, router=router, gate_noise=0.0)
        x = images()
        y, aux = layer(x)
        logits = layer.router(x.view(-1, DIM)).view(3, 4, 12)
        expected = torch.stack([soft_slowly(*image, 3, weights(layer)) for image in zip(x, logits)])
        torch.testing.assert_close(y, expected)
        assert aux.item() == 0.0 and layer.stats.demand.tolist() == [9] * 4 and int(layer.stats.dropped) == 0


def test_an_image_does_not_see_the_others():
    layer, x = build(choice="soft", balance_loss="none", slots=2).eval(), images()
    torch.testing.assert_close(layer(x)[0][1:2], layer(x[1:2])[0])

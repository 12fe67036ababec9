"""The bias that balances: one step by hand, once per step whatever the accumulation, and never on a skipped step."""

import math

import pytest
import torch

from swin_moe.checkpoint import Piece
from swin_moe.config import MoEConfig
from swin_moe.engine.router_balance import RouterBalance
from swin_moe.layout import Chunk
from swin_moe.moe import MoELayer, RoutingStats
from swin_moe.parallel.groups import single_process_groups
from tests.engine.test_common import engine, train

BALANCED = ("model.moe.scores=sigmoid", "model.moe.bias_rate=0.125", "model.moe.balance_loss=none")


class Net(torch.nn.Module):
    def __init__(self, rate):
        super().__init__()
        config = MoEConfig(num_experts=3, scores="sigmoid", balance_loss="none", bias_rate=rate)
        self.mlp = MoELayer(4, 8, config, fc2_bias=True, layer=0, init_std=0.1)
        self.mlp.init_weights(0, "mlp")

    def load(self, *demand):
        zero = torch.zeros(())
        self.mlp.stats = RoutingStats(torch.tensor(demand), torch.tensor(demand), zero, zero, zero)


def halves(net):
    """Returns the bias as two pieces, as an engine that cuts it has them."""
    bias = net.mlp.router.balance.bias.detach()
    return lambda name: [Piece(name, (3,), bias.dtype, Chunk((s,), (n,)), bias[s : s + n]) for s, n in ((0, 2), (2, 1))]


def test_by_hand():
    net = Net(rate=0.5)
    balance = RouterBalance(net, single_process_groups(), halves(net))
    net.load(2, 1, 0)
    balance.count()
    net.load(1, 1, 1)
    balance.count()  # 3, 2, 1 in all, 2 on average
    balance.update()
    assert net.mlp.router.balance.bias.tolist() == [-0.5, 0.0, 0.5]
    net.load(0, 0, 6)
    balance.count()
    balance.clear()  # a skipped step
    net.load(0, 1, 1)
    balance.count()  # 2 / 3 on average
    balance.update()
    assert net.mlp.router.balance.bias.tolist() == [0.0, -0.5, 0.0]


def test_without_a_rate_nothing_is_counted():
    net = Net(rate=0.0)
    balance = RouterBalance(net, single_process_groups(), halves(net))
    balance.count()
    balance.update()
    assert not net.mlp.router.balance.bias.any()


def biases(trained):
    return {n: p.detach().clone() for n, p in trained.local_model.named_parameters() if n.endswith("balance.bias")}


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_load_is_what_the_experts_were_asked_for_in_all_micro_batches(recompute):
    trained = engine(*BALANCED, f"parallel.recompute={recompute}")
    layers = {n: m for n, m in trained.local_model.named_modules() if isinstance(m, MoELayer)}
    loads = dict.fromkeys(layers, 0)
    for micro in range(3):
        with trained.micro_step(last=micro == 2):
            logits, aux = trained.model(torch.randn(2, 3, 32, 32))
            trained.backward(logits.square().sum() + aux)
        loads = {name: loads[name] + layer.stats.demand.double() for name, layer in layers.items()}
    trained.step(0)
    assert len(layers) == 2 and all(load.sum() == 3 * 2 * tokens for load, tokens in zip(loads.values(), (64, 16)))
    for name, load in loads.items():
        expected = 0.125 * (load.mean() - load).sign()
        torch.testing.assert_close(biases(trained)[f"{name}.router.balance.bias"].double(), expected)
        assert expected.any()


@pytest.mark.parametrize("options", [(), ("engine.offload=optimizer",), ("parallel.recompute=block",)])
def test_engines_move_it_alike_and_average_it(options):
    plain, other = engine(*BALANCED, "optim.ema=0.5"), engine(*BALANCED, "optim.ema=0.5", *options)
    for trained in (plain, other):
        torch.manual_seed(1)  # of gate noise and drop path
        train(trained, 3)
    assert biases(plain).keys() == biases(other).keys() and len(biases(plain)) == 2
    for name, bias in biases(plain).items():
        assert torch.equal(bias, biases(other)[name])
        assert not torch.equal(other.ema.average[name], bias) and other.ema.average[name].any()


def test_a_skipped_step_leaves_the_bias():
    trained = engine(*BALANCED)
    train(trained, 1)
    before = biases(trained)
    logits, aux = trained.model(torch.randn(2, 3, 32, 32))
    trained.backward(logits.sum() * math.nan + aux)
    assert trained.step(1).skipped
    trained.discard_gradients()
    assert all(torch.equal(bias, before[name]) for name, bias in biases(trained).items())
    assert trained.balance.load_LE is None

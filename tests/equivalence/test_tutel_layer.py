"""Our whole layer against Tutel's own, on random configurations; only where Tutel is importable.

Same weights, tokens and gate noise: outputs, balance loss and every gradient agree to float32, token for token. Where
the load loss does not, ours has to be nearer to float64: Tutel takes the normal distribution's lower tail as 1 + erf,
which float32 cancels to multiples of 6e-8, and the loss divides by the tail's mean. Measured: ours is within 6e-5 of
float64, Tutel's up to 1.4e-2 away (the gradient of the cosine router's temperature).

Excluded is what tutel.py blocks or what differs by rule: capacity by need where confident tokens come first (Tutel
drops some there), experts on several ranks (Tutel rounds the capacity up to a multiple of them).
"""

import random
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from swin_moe.config import MoEConfig, ParallelConfig
from swin_moe.moe.layer import MoELayer
from swin_moe.parallel.apply import parallelize
from swin_moe.parallel.groups import build_groups
from swin_moe.randomness import RandomContext, normal
from tests.equivalence.backend_cases import difference
from tests.parallel.exchange.tutel_stand_in import is_importable
from tests.ranks import run_ranks

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(not is_importable(), reason="Tutel is not importable")]

CONFIGURATIONS = 60  # per world
ALLOWED = 2e-5  # relative by norm; the largest found where they agree is 1.3e-5
LAYER = 3


@dataclass(frozen=True)
class Drawn:
    """One random configuration; tokens per rank."""

    tokens: int
    dim: int
    hidden: int
    config: MoEConfig
    training: bool
    seed: int


def draw(number: int, world: int, backend: str) -> Drawn:
    rng = random.Random(number)
    experts = world * rng.choice((1, 2, 4, 8))
    confident, gshard = rng.random() < 0.5, rng.random() < 0.5
    factors = (1.25, 1.25, 1.25, 0.5, 1.0, 2.0, *(() if confident else (0.0, -0.75)))
    config = MoEConfig(
        num_experts=max(experts, 2),
        top_k=min(rng.choice((1, 2, 3)), max(experts, 2)),
        capacity_factor=rng.choice(factors),
        eval_capacity_factor=None,
        router=rng.choice(("linear", "cosine")),
        cosine_dim=16,
        normalize_gate=rng.random() < 0.5,
        batch_prioritized=confident,
        balance_loss="gshard" if gshard else "load_importance",
        aux_loss_weight=1.0,
        gate_noise=rng.choice((0.0, 1.0)) if gshard else 1.0,
        backend=backend,
    )
    dim = 2 * rng.randrange(2, 20)
    return Drawn(rng.randrange(8, 300), dim, rng.randrange(4, 50), config, rng.random() < 0.7, number)


def peer_of(layer: MoELayer, drawn: Drawn, num_local: int):
    """Returns Tutel's layer with our weights, and our parameter names -> its parameters."""
    from tutel import moe

    config, cosine = drawn.config, drawn.config.router == "cosine"
    gate = {"type": "top", "k": config.top_k, "gate_noise": config.gate_noise}
    gate["capacity_factor"] = config.capacity_factor
    if cosine:
        gate |= {"type": "cosine_top", "proj_dim": config.cosine_dim, "init_t": config.cosine_init_t}
    peer = moe.moe_layer(
        gate_type=gate,
        experts={
            "type": "ffn",
            "num_experts_per_device": num_local,
            "hidden_size_per_expert": drawn.hidden,
            "activation_fn": F.gelu,
        },
        model_dim=drawn.dim,
        batch_prioritized_routing=config.batch_prioritized,
        normalize_gate=config.normalize_gate,
        is_gshard_loss=config.balance_loss == "gshard",
    ).train(drawn.training)
    names = {
        "experts.fc1_weight": "experts.batched_fc1_w",
        "experts.fc1_bias": "experts.batched_fc1_bias",
        "experts.fc2_weight": "experts.batched_fc2_w",
        "experts.fc2_bias": "experts.batched_fc2_bias",
    }
    if cosine:
        names |= {
            "router.temperature": "gates.0.temperature",
            "router.sim_matrix": "gates.0.sim_matrix",
            "router.projector.weight": "gates.0.cosine_projector.weight",
            "router.projector.bias": "gates.0.cosine_projector.bias",
        }
    else:
        names["router.weight"] = "gates.0.wg.weight"
    theirs = {ours: peer.get_parameter(name) for ours, name in names.items()}
    assert len(theirs) == len(list(peer.parameters())) == len(list(layer.parameters()))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            theirs[name].copy_(parameter)
    return peer, theirs


def layer_of(drawn: Drawn, backend: str) -> MoELayer:
    experts, config = drawn.config.num_experts, replace(drawn.config, backend=backend)
    layer = MoELayer(drawn.dim, drawn.hidden, config, fc2_bias=True, layer=LAYER, init_std=0.2)
    layer.init_weights(drawn.seed, "layer")
    with torch.no_grad():  # biases start as zeros, which would hide them
        layer.experts.fc1_bias.copy_(torch.randn(experts, drawn.hidden, generator=seeded(drawn)))
        layer.experts.fc2_bias.copy_(torch.randn(experts, drawn.dim, generator=seeded(drawn)))
    parallelize(layer, ParallelConfig(), build_groups(ParallelConfig(), experts, torch.device("cpu")))
    return layer.train(drawn.training)


def compare(drawn: Drawn) -> dict:
    """Returns the relative differences on this rank, those from float64 as well, and how many pairs were dropped."""
    world, rank, experts = dist.get_world_size(), dist.get_rank(), drawn.config.num_experts
    layer, exact = layer_of(drawn, drawn.config.backend), layer_of(drawn, "native").double()
    peer, theirs = peer_of(layer, drawn, experts // world)
    shape = (world, drawn.tokens, drawn.dim)
    x, seen = (torch.randn(shape, generator=seeded(drawn, 1 + i))[rank] for i in range(2))
    context = RandomContext(drawn.seed, 1, torch.tensor([rank]))
    noise = normal(context.key("gate_noise", LAYER), rank * drawn.tokens + torch.arange(drawn.tokens), experts)

    def run(tokens):
        y, aux = peer(tokens), peer.l_aux
        return y[None], aux

    sides = {
        "ours": (lambda tokens: layer(tokens[None], context), dict(layer.named_parameters()), torch.float32),
        "exact": (lambda tokens: exact(tokens[None], context), dict(exact.named_parameters()), torch.float64),
        "theirs": (run, theirs, torch.float32),
    }
    found = {}
    for who, (forward, parameters, dtype) in sides.items():
        tokens = x.to(dtype, copy=True).requires_grad_()
        with mock.patch("torch.randn_like", lambda logits: noise.to(logits.dtype)):  # what Tutel draws
            y, aux = forward(tokens)
        ((y[0] * seen).sum() + 3 * aux).backward()
        grads = {f"{name}.grad": p.grad for name, p in parameters.items()}
        found[who] = {"y": y[0], "aux": aux, "x.grad": tokens.grad, **grads}
        found[who] = {name: value.detach().double() for name, value in found[who].items()}
    pairs = {"apart": ("ours", "theirs"), "ours": ("ours", "exact"), "theirs": ("theirs", "exact")}
    assert layer.stats is not None, "it has just run"
    results: dict[str, Any] = {"dropped": int(layer.stats.dropped)}
    for what, (a, b) in pairs.items():
        results[what] = {name: difference(found[a][name], expected) for name, expected in found[b].items()}
    return results


def seeded(drawn: Drawn, number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(100 * drawn.seed + number)


def compare_all(backend: str) -> list[dict]:
    """Returns what every configuration gave on this rank."""
    world = dist.get_world_size()
    return [compare(draw(number, world, backend)) for number in range(CONFIGURATIONS)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("backend", ["native", "tutel"])
def test_equals_tutel(backend, world, tmp_path):
    agreed, disagreed, dropped = [0.0], set(), 0
    for rank, results in enumerate(run_ranks(compare_all, world, tmp_path, backend)):
        for number, found in enumerate(results):
            dropped += found["dropped"] > 0
            for name, apart in found["apart"].items():
                if apart <= ALLOWED:
                    agreed.append(apart)
                    continue
                drawn = draw(number, world, backend)
                nearer = found["ours"][name] < found["theirs"][name]
                assert nearer and drawn.config.balance_loss == "load_importance" and name != "y", (
                    f"rank {rank}, {drawn}: {name} is {apart:.1e} from Tutel's; from float64 ours is "
                    f"{found['ours'][name]:.1e}, Tutel's {found['theirs'][name]:.1e}"
                )
                disagreed.add(number)
    print(f"largest difference where they agree {max(agreed):.1e}; Tutel's load loss is off in {sorted(disagreed)}")
    assert dropped > CONFIGURATIONS / 5 and len(disagreed) < CONFIGURATIONS / 6

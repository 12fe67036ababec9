"""What every rank runs to check model.moe.tune=measure: one choice for all, kept, read again, and exact."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from swin_moe.config import MoEConfig, ParallelConfig
from swin_moe.moe import MoELayer
from swin_moe.parallel.apply import parallelize
from swin_moe.parallel.exchange import tune as tuning
from swin_moe.parallel.groups import build_groups

CPU = torch.device("cpu")
CONFIG = MoEConfig(num_experts=8, top_k=2, tune="measure")
HOSTS = {2: (0, 0), 4: (0, 0, 0, 1)}


def build(groups, config):
    """Returns a layer with weights, cut to this rank's part."""
    layer = MoELayer(8, 16, config, fc2_bias=True, layer=0, init_std=0.5).eval()
    layer.init_weights(0, "mlp")
    return parallelize(torch.nn.Sequential(layer), ParallelConfig(), groups)[0].double()


def run(layer, groups):
    """Returns (output, input gradient) on this rank's tokens."""
    x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(groups.rank)).requires_grad_()
    y, _ = layer(x)
    (y * y.detach()).sum().backward()
    return y.detach(), x.grad


def tune(layer, groups, dtype=torch.float64):
    tuning.tune([(layer, 12)], groups, dtype=dtype, device=CPU)
    return str(layer.dispatcher.link)


def prefer(wanted):
    """Returns a stand-in for the measurement in which one candidate is fastest, on every rank by a time of its own."""

    def measure(shape, layer, options, groups, device, dtype):
        return [1.0 + 0.1 * groups.rank if str(option) == wanted else 2.0 for option in options]

    return measure


def refuse(*_):
    raise AssertionError("measured although the choice is on disk")


def run_world(root: str) -> list[str]:
    """Returns the links that this rank was given, in the order of the starts."""
    world = dist.get_world_size()
    groups = build_groups(ParallelConfig(), 8, CPU, two_hops=True, hosts=HOSTS[world])
    config = dataclasses.replace(CONFIG, tune_cache=root, payload="bf16")
    chosen, measure = [], tuning._measure
    tuning.ROUNDS = 1

    before = torch.get_rng_state()
    layer = build(groups, config)
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    chosen.append(tune(layer, groups))
    assert torch.equal(before, torch.get_rng_state()), "the run's random numbers were used"
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in layer.named_parameters())
    assert "measured" in layer.dispatcher.link.reason

    tuning._measure = refuse
    again = build(groups, config)
    chosen.append(tune(again, groups))
    assert "kept from an earlier start" in again.dispatcher.link.reason
    dist.barrier()

    (file,) = Path(root).glob("*.json")
    if groups.rank == 0:
        file.write_text(file.read_text()[:40])
    dist.barrier()
    tuning._measure = measure
    chosen.append(tune(build(groups, config), groups))

    # Without rounding every choice gives the same result.
    exact = dataclasses.replace(config, payload="none")
    expected = run(build(groups, exact), groups)
    for overlap in tuning.OVERLAPS:
        for transport in ("linear", "hierarchical"):
            dist.barrier()
            wanted = f"{transport}, payload none, overlap {overlap}"
            tuning._measure = prefer(wanted)
            own = dataclasses.replace(exact, tune_cache=f"{root}/{transport}{overlap}")
            layer = build(groups, own)
            chosen.append(tune(layer, groups))
            for found, reference in zip(run(layer, groups), expected):
                torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)

    # A backend that pads sends other rows, so it measures for itself; any choice gives the same there too.
    tuning._measure = prefer("linear, payload none, overlap 2")
    layer = build(groups, dataclasses.replace(config, backend="padded"))
    assert tune(layer, groups).endswith("payload none, overlap 2") and "measured" in layer.dispatcher.link.reason
    for found, reference in zip(run(layer, groups), expected):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)
    tuning._measure = measure
    return chosen

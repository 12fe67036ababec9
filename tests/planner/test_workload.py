"""Counts of the planner against the networks themselves, for every shipped config; nothing grows with the experts."""

import math
import time
from dataclasses import replace

import pytest
import torch

from swin_moe.config import Config, ModelConfig, MoEConfig
from swin_moe.config.io import load_config
from swin_moe.config.shipped.listing import shipped
from swin_moe.planner.workload import build_workload, task_to_count

# Official files that leave the size of the world open are read with the batch of the published recipe.
NAMES = sorted(name for names in shipped([]).values() for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_the_networks_own(name):
    config = load_config(name)
    if config.task.options.any_size:
        with pytest.raises(ValueError, match="the planner counts networks of images of model.img_size alone"):
            build_workload(config)
        return
    with torch.device("meta"):
        network = task_to_count(config).build_network()
    work = build_workload(config)
    assert (work.flops, work.active_flops) == (network.flops(), network.active_flops())
    assert sum(macs for _, macs in work.macs) == pytest.approx(network.active_flops(), rel=1e-12)
    assert work.numel() == sum(p.numel() for p in network.parameters())
    assert work.numel(trained=True) <= work.numel()
    experts = sum(math.prod(p.shape) for n, p in network.named_parameters() if ".experts." in n)
    assert work.numel(experts=True) == experts


def test_rows_and_weights_of_moe_layers():
    config = load_config("swin_moe_base_patch4_window12_192_32expert_top2_22k")
    work = build_workload(config)
    first, last = work.moe[0], work.moe[-1]
    assert len(work.moe) == 10 and first.name == "layers.2.blocks.1" and last.name == "layers.3.blocks.1"
    assert (first.tokens, first.rows, first.dim, first.hidden) == (144, 288, 512, 2048)
    assert first.weights == 32 * (2 * 512 * 2048 + 512 + 2048)


def test_the_table_is_no_longer_with_thousands_of_experts():
    moe = MoEConfig(blocks=((), (), (1, 3)), num_experts=2048)
    few = replace(moe, num_experts=8)
    many, short = (build_workload(Config(model=ModelConfig(moe=m))) for m in (moe, few))
    assert len(many.parameters) == len(short.parameters) and len(many.macs) == len(short.macs)
    assert many.moe[0].weights == 256 * short.moe[0].weights


def test_the_giant_is_counted_in_a_moment():
    started = time.process_time()
    work = build_workload(load_config("swinv2_giant_3b_patch4_window12_192_22k"))
    assert work.numel() > 3e9 and time.process_time() - started < 5

"""How many kernels a training step may start: counts of benchmarks/launches.py, held for networks that are quick."""

import launches
import pytest
import torch

from swin_moe import create_model
from swin_moe.ops import extension

# Operators of a training step in bfloat16: the goal of Swin-T (655 counted), and of the demo's network with its three
# MoE layers a tenth more than the 489 counted.
MOST = {"swin_tiny_patch4_window7_224": 900, "digits_swin_moe": 540}


@pytest.mark.skipif(not extension.available("cpu"), reason="the kernels were not built")
@pytest.mark.parametrize("name", MOST)
def test_a_training_step_starts_few_kernels(name):
    model = create_model(name)
    counts = launches.count_steps(model, model.img_size[0], batch=1, precision="bf16")
    step = counts["forward"] + counts["backward"]
    assert 0 < sum(step.values()) <= MOST[name], step.most_common(12)


def test_views_and_allocations_start_none():
    x = torch.randn(4, 6)
    with launches.LaunchCounter() as counter:
        x.view(24)[:3].t()
        torch.empty_like(x)
        assert counter.total == 0
        x.add(1).mul_(2)
    assert counter.total == 2

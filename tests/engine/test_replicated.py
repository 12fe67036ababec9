"""DDP around our model: its needless warning is hidden, and nothing else that is written."""

import os

import pytest
import torch
import torch.distributed as dist

from swin_moe.config import ParallelConfig
from swin_moe.engine.replicated import replicate, without_needless_warning
from swin_moe.parallel.groups import build_groups
from tests.ranks import run_ranks

WARNING = b"[W reducer.cpp:1] Warning: find_unused_parameters=True was specified in DDP constructor, but (function x)\n"


def test_only_one_line_is_hidden(capfd):
    with without_needless_warning():
        for line in (b"before\n", WARNING, b"after, without an end"):
            os.write(2, line)
    os.write(2, b", outside\n")
    assert capfd.readouterr().err == "before\nafter, without an end, outside\n"


def test_it_is_hidden_when_something_fails(capfd):
    with pytest.raises(KeyError), without_needless_warning():
        os.write(2, WARNING + b"kept\n")
        raise KeyError
    os.write(2, WARNING)
    assert capfd.readouterr().err == "kept\n" + WARNING.decode()


def two_steps() -> list[float]:
    """Returns the gradient of two steps of a replicated layer."""
    groups = build_groups(ParallelConfig(expert=1, expert_shard=1), 1, torch.device("cpu"))
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    model = replicate(layer, groups)
    for _ in range(2):
        model.zero_grad()
        model(torch.full((1, 1), 1.0 + dist.get_rank())).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad.tolist()


@pytest.mark.mpi
def test_ranks_say_nothing(tmp_path, capsys):
    assert run_ranks(two_steps, 2, tmp_path) == [[[1.5]], [[1.5]]]
    assert "find_unused_parameters" not in capsys.readouterr().out

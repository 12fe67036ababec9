"""Groups of a single process and what the environment may say; groups over ranks: tests/equivalence."""

import copy

import pytest
import torch

from swin_moe.config import ParallelConfig
from swin_moe.parallel.groups import (
    Degrees,
    Groups,
    build_groups,
    communication_backend,
    init_distributed,
    single_process_groups,
)

CPU = torch.device("cpu")


def test_one_process_needs_no_process_group():
    groups = build_groups(ParallelConfig(), 8, CPU)
    assert groups == single_process_groups()
    assert (groups.world_size, groups.rank, groups.expert_size, groups.expert_rank) == (1, 0, 1, 0)
    assert groups.world is None and groups.expert is None and groups.shard is None and groups.expert_data is None


def test_a_layout_for_more_ranks_is_refused():
    with pytest.raises(ValueError, match="does not divide the world of 1 ranks"):
        build_groups(ParallelConfig(expert=2), 8, CPU)


def test_place_in_the_expert_group_by_hand():
    groups = Groups(8, 6, Degrees(2, 2, 2))
    assert groups.expert_size == 4 and groups.expert_rank == 2
    assert groups.coordinates == {"expert": (1, 2), "expert_shard": (0, 2), "expert_data": (1, 2)}


def test_a_copied_model_keeps_its_groups():
    groups = single_process_groups()
    assert copy.deepcopy({"groups": groups})["groups"] is groups


def test_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert init_distributed(CPU) == (0, 1)
    for text, told in (("two", "'two'"), ("1" * 5000, "one of 5000 digits")):
        monkeypatch.setenv("WORLD_SIZE", text)
        with pytest.raises(
            ValueError, match=f"environment variable WORLD_SIZE must be a whole number >= 0, got {told}"
        ):
            init_distributed(CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but MASTER_ADDR, MASTER_PORT is not set"):
        init_distributed(CPU)


def test_ranks_that_share_a_device_talk_over_gloo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert communication_backend(CPU, 1) == "gloo"
    assert communication_backend(torch.device("cuda", 1), 2) == "cpu:gloo,cuda:nccl"
    assert communication_backend(torch.device("cuda", 1), 3) == "gloo"

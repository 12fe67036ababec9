"""Ranks with other options are told at the start, by key; what a host may have of its own is no difference."""

import pytest
from torch.distributed import HashStore

from swin_moe.config.io import load_config
from swin_moe.run.agreement import check_agreement

FOLDER = ("data.name=folder", "data.path=/scratch/a")


def agree(first, other):
    store = HashStore()
    check_agreement(load_config("digits_swin_moe", first), 0, store)
    check_agreement(load_config("digits_swin_moe", other), 3, store)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ((), ()),
        (FOLDER, ("data.name=folder", "data.path=/scratch/b", "data.workers=3", "engine.threads=2")),
        (("checkpoint.load=/a",), ("checkpoint.load=/b",)),
        (("optim.lr=1e-3",), ("optim.lr=0.001",)),
    ],
)
def test_the_same_options_and_what_hosts_may_have_of_their_own(first, other):
    agree(first, other)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("optim.lr=0.5",), "optim.lr is 0.5 on rank 3 and 0.002 on rank 0; every rank needs the same options"),
        (("run.seed=7",), "run.seed is 7 on rank 3 and 0 on rank 0"),
        (("model.drop_rate=0.5", "run.seed=7"), r"model.drop_rate is 0.5 on rank 3 and 0.0 on rank 0 \(and 1 more\)"),
        (("data.global_batch=32",), "data.global_batch is 32 on rank 3"),
        (("checkpoint.load=/a",), "checkpoint.load is true on rank 3 and false on rank 0"),
        (("run.output=/elsewhere",), 'run.output is "/elsewhere" on rank 3'),
        (("model.moe.blocks=[[1],[1]]",), r"model.moe.blocks is \[\[1\], \[1\]\] on rank 3"),
    ],
)
def test_other_options_are_refused_by_key(other, said):
    with pytest.raises(ValueError, match=said):
        agree((), other)

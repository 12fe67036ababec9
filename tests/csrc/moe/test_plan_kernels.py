"""The CUDA kernels that order rows for experts, run on the host, against the Python form."""

import ctypes

import pytest
import torch

from swin_moe.moe.dispatch import padded_rows
from swin_moe.ops.moe import moe_plan
from tests.csrc.emulation import build
from tests.ops.moe.test_moe_plan import ROUTINGS, make_order, make_padded_order

POINTERS = ("expert", "slot", "keep", "kept", "position", "pair", "vacant", "counts", "first")
NUMBERS = ("pairs", "top_k", "groups", "experts", "group_size", "rows", "padded_rows")


class PlanLaunch(ctypes.Structure):
    """swin_moe::PlanLaunch."""

    _fields_ = [(n, ctypes.c_void_p) for n in POINTERS] + [(n, ctypes.c_int64) for n in NUMBERS]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("make", ROUTINGS.values(), ids=ROUTINGS)
def test_equals_the_python_form(monkeypatch, make, backwards):
    if backwards:
        monkeypatch.setenv("SWIN_MOE_EMULATION_REVERSE", "1")
    monkeypatch.setattr(moe_plan, "available", lambda expert: False)
    routing, library = make(), build()
    sizes = (int(routing.kept.sum()), -1), (routing.expert.numel(), -1), (None, padded_rows(routing))
    orders = make_order(routing, sizes[0][0]), make_order(routing, None), make_padded_order(routing, sizes[2][1])
    for (num_rows, padded), expected in zip(sizes, orders):
        experts = routing.kept.shape[1]
        rows = experts * padded if num_rows is None else num_rows
        tensors = {name: getattr(routing, name).contiguous() for name in POINTERS[:4]}
        tensors["position"] = torch.full_like(routing.expert, -7)
        tensors["pair"] = torch.zeros(rows, dtype=torch.int64)
        tensors["vacant"] = torch.ones(rows, dtype=torch.bool) if num_rows is None else None
        tensors["counts"], tensors["first"] = torch.full((experts,), -7), torch.full_like(routing.kept, -7)
        launch = PlanLaunch(
            *(None if v is None else v.data_ptr() for v in tensors.values()),
            routing.expert.numel(),
            routing.top_k,
            len(routing.kept),
            experts,
            routing.group_size,
            rows,
            padded,
        )
        assert library.swin_moe_plan(ctypes.byref(launch), None) == 0
        assert torch.equal(tensors["position"].where(routing.keep, torch.tensor(0)), tensors["position"])
        assert torch.equal(tensors["position"], expected.position.where(routing.keep, torch.tensor(0)))
        assert torch.equal(tensors["pair"], expected.pair)
        assert torch.equal(tensors["counts"], routing.kept.sum(0))
        assert num_rows is not None or torch.equal(tensors["vacant"], expected.vacant)

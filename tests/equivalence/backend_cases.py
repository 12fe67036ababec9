"""What every rank runs to compare the backends of the MoE layer with each other, and what one MPI start runs in all."""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from swin_moe.moe import MoELayer
from swin_moe.parallel.apply import parallelize
from swin_moe.parallel.groups import Groups
from swin_moe.randomness import RandomContext
from tests.equivalence import expert_parallel_cases as spread_cases
from tests.equivalence.expert_parallel_cases import (
    NOISY,
    Case,
    Net,
    build,
    data,
    groups_of,
    spread,
    together,
    transport_of,
)
from tests.parallel.exchange import tutel_stand_in

CONFIDENT: dict[str, Any] = {"batch_prioritized": True, "top_k": 2, **NOISY}
SLOW = ("group on 2 ranks: ",)  # 32 options of the router, which backends do not see; some of them stand for all

# Beyond the layouts of expert_parallel_cases.py.
CASES = {
    1: {
        "by confidence, drops": Case((3,), options={**CONFIDENT, "capacity_factor": 0.5}),
        "by confidence and need": Case((3,), options={**CONFIDENT, "capacity_factor": 0.0}),
        "no slots": Case((3,), options={"capacity_factor": 0.1}),
        "groups of images": Case((4,), options={"capacity_scope": "images", "group_images": 2, **CONFIDENT}),
        "a starved expert": Case((3,), starve=1),
    },
    2: {
        "by confidence, drops": Case((2, 3), options={**CONFIDENT, "capacity_factor": 0.5}),
        "by confidence and need": Case((1, 3), options={**CONFIDENT, "capacity_factor": 0.0}),
        "by need, an empty rank": Case((0, 3), options={**CONFIDENT, "capacity_factor": 0.0}),
        "group by need": together((2, 1), 2, capacity_factor=0.0, **CONFIDENT),
        "group with drops": together((2, 1), 2, capacity_factor=0.5, **CONFIDENT),
        "bf16 payload": Case((2, 1), options={**CONFIDENT, "payload": "bf16"}),
        "fp8 payload in slices": Case((2, 1), options={**CONFIDENT, "payload": "fp8", "overlap": 2}),
    },
    4: {
        "by confidence and need": Case((1, 3, 0, 1), experts=8, options={**CONFIDENT, "capacity_factor": 0.0}),
        "group by need": together((2, 2, 1, 0), 4, capacity_factor=0.0, **CONFIDENT),
        "group with drops, 2 x 2": together((2, 2, 2, 1), 2, parallel=spread(2), capacity_factor=0.5, **CONFIDENT),
    },
}


def cases_of(world: int) -> dict[str, Case]:
    """Returns the cases on which backends are compared."""
    layouts = {name: case for name, case in spread_cases.CASES[world].items() if not name.startswith(SLOW)}
    return {**layouts, **CASES[world]}


def backends_of(case: Case, dtype: torch.dtype, alone: bool) -> list[str]:
    """Returns the backends that serve a case, but for native."""
    backends = ["padded"]
    if alone:
        backends.append("local")
    if dtype == torch.float32:
        backends.append("tutel")
    return backends


def results_of(case: Case, backend: str, dtype: torch.dtype, groups: Groups) -> tuple[dict[str, torch.Tensor], str]:
    """Returns (this rank's output, balance loss and gradients with a backend, the name of the dispatcher)."""
    case = replace(case, options={**case.options, "backend": backend})
    with torch.device("meta"):
        net = Net(build(case))
    net = parallelize(net, case.parallel, groups).to_empty(device="cpu").initialize(case).to(dtype)
    rank, world = dist.get_rank(), dist.get_world_size()
    xs, seens = data(case)
    x, seen = xs[rank].to(dtype).requires_grad_(), seens[rank].to(dtype)
    sample = torch.arange(sum(case.images)).split(case.images)[rank]
    share = len(x) * world / max(sum(case.images), 1)
    y, loss = net.run(x, seen, RandomContext(7, 3, sample), share, case.recompute)
    loss.backward()
    assert net.mlp.stats is not None, "it has just run"
    found = {"y": y, "aux": net.mlp.stats.aux, "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert all(value is not None for value in found.values())
    twin = copy.deepcopy(net).eval()
    assert torch.equal(twin.mlp(x)[0], net.eval().mlp(x)[0])
    return {name: value.detach() for name, value in found.items()}, described(net.mlp)


def described(layer: MoELayer) -> str:
    """Returns what kind of dispatcher the layer has, and how its rows travel."""
    return f"{type(layer.dispatcher).__name__} {transport_of(layer)}".strip()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the norm of the difference over the expected norm; shapes have to be equal."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    apart = float((found - expected).norm()) if found.numel() else 0.0
    return apart / max(float(expected.norm()), 1e-30) if apart else 0.0


def compare_backends(case: Case) -> dict[tuple[str, str], dict]:
    """Returns (backend, dtype) -> this rank's differences from native, and the dispatcher that was used."""
    groups = groups_of(case)
    found = {}
    # A payload rounds numbers that differ in their last bits now and then to different ones; in float64, never.
    dtypes = (torch.float64, torch.float32) if case.config.payload == "none" else (torch.float64,)
    for dtype in dtypes:
        native, _ = results_of(case, "native", dtype, groups)
        for backend in backends_of(case, dtype, groups.expert_size == 1):
            other, kind = results_of(case, backend, dtype, groups)
            assert other.keys() == native.keys()
            errors = {name: difference(other[name], value) for name, value in native.items()}
            found[backend, str(dtype).removeprefix("torch.")] = {"errors": errors, "dispatcher": kind}
    return found


def run_world() -> dict:
    """Returns what one MPI start finds out: "spread" and "backends", each case -> what it gave on this rank; and
    "tutel", whether it was the real one.
    """
    real = tutel_stand_in.is_importable()
    tutel_stand_in.install_if_missing()
    backends = {name: compare_backends(case) for name, case in cases_of(dist.get_world_size()).items()}
    return {"spread": spread_cases.run_world(), "backends": backends, "tutel": real}

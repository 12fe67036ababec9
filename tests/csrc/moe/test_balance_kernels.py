"""The CUDA kernels of balance losses, run on the host, against moe/losses.py by autograd."""

import ctypes

import pytest
import torch

from swin_moe.ops.moe.moe_balance import KINDS
from swin_moe.ops.moe.moe_route import MAX_EXPERTS_CUDA
from tests.csrc.emulation import Guarded, build
from tests.ops.moe.test_moe_balance import slowly

TENSORS = (
    "scores",
    "threshold",
    "logits",
    "expert",
    "sums",
    "load",
    "log_sum",
    "partials",
    "squares",
    "balance",
    "aux",
    "grad",
    "grad_scores",
    "grad_threshold",
    "grad_logits",
)
NUMBERS = ("tokens", "experts", "top_k", "group_size", "groups", "chunks")
CHUNK = 128  # swin_moe::kBalanceRows
SHAPES = {  # tokens, experts, group size
    "one group": (300, 8, 300),
    "groups in chunks, the last smaller": (700, 5, 300),
    "a token a group": (9, 6, 1),
    "one expert": (150, 1, 150),
    "many experts": (40, 70, 16),
}


class BalanceLaunch(ctypes.Structure):
    """swin_moe::BalanceLaunch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in TENSORS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_double) for name in ("noise_std", "weight", "z_weight")),
        ("kind", ctypes.c_int64),
        ("wide", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library():
    return build()


def inputs_of(tokens, experts, dtype, kind):
    """Returns (scores, threshold, expert, logits), leaves of their own."""
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens), dtype=dtype)
    scores = torch.sigmoid(logits) if kind == "gshard of shares" else torch.softmax(logits, 1)
    chosen = logits.topk(min(2, experts), dim=1)
    threshold = chosen.values[:, -1] * 0.3
    threshold[0] = scores[0, 0]  # a score at its threshold is not above it
    return scores.requires_grad_(), threshold.requires_grad_(), chosen.indices, logits.requires_grad_()


def run(library, tensors, kind, shape, grad, *, with_z, noise_std=0.2, weight=0.03, z_weight=0.7):
    """Returns (aux, balance, gradients of scores, threshold and logits) as the kernels write them."""
    scores, threshold, expert, logits = (t.detach() for t in tensors)
    (tokens, experts, size), dtype = shape, scores.dtype
    size = tokens if kind == "none" else size
    groups, chunks = -(-tokens // size), -(-size // CHUNK)
    given = {"scores": scores, "threshold": threshold, "grad": torch.tensor(grad, dtype=dtype)}
    given |= {"logits": logits} if with_z else {}
    shapes = {"sums": (groups, experts), "load": (groups, experts), "log_sum": (tokens,), "balance": (), "aux": ()}
    shapes |= {"partials": (groups * chunks, 2, experts), "squares": (groups * chunks,)}
    gradients = {"grad_scores": (tokens, experts), "grad_threshold": (tokens,), "grad_logits": (tokens, experts)}
    memory = {name: Guarded.copy(t) for name, t in given.items()}
    memory |= {name: Guarded(wanted, dtype) for name, wanted in (shapes | gradients).items()}
    launch = BalanceLaunch(
        tokens=tokens,
        experts=experts,
        top_k=expert.shape[1],
        group_size=size,
        groups=groups,
        chunks=chunks,
        noise_std=noise_std,
        weight=weight,
        z_weight=z_weight,
        kind=KINDS[kind],
        wide=dtype == torch.float64,
        expert=expert.contiguous().data_ptr(),
        **{name: guarded.address for name, guarded in memory.items()},
    )
    assert library.swin_moe_balance(ctypes.byref(launch), None) == 0
    if kind in ("none", "gshard"):  # whose backward does not ask for scores
        launch.scores = None
    assert library.swin_moe_balance_backward(ctypes.byref(launch), None) == 0
    assert all(guarded.intact() for guarded in memory.values())
    return [memory[name].tensor for name in ("aux", "balance", *gradients)]


@pytest.mark.parametrize("noise_std", [0.2, 0.0])
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_python_form(library, kind, shape, dtype, with_z, noise_std):
    options = {"noise_std": noise_std, "weight": 0.03, "z_weight": 0.7}
    tensors = inputs_of(*shape[:2], dtype, kind)
    found = run(library, tensors, kind, shape, 1.7, with_z=with_z, **options)
    scores, threshold, expert, logits = (t.detach().double() if t.is_floating_point() else t for t in tensors)
    leaves = [t.requires_grad_() for t in (scores, threshold, logits)]
    aux, balance = slowly(
        scores, threshold, expert, kind=kind, group_size=shape[2], logits=logits if with_z else None, **options
    )
    grads = [None] * 3
    if aux.requires_grad:
        grads = torch.autograd.grad(aux * 1.7, leaves, allow_unused=True)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-7}
    for made, wanted in zip(found, (aux.detach(), balance, *grads)):
        if wanted is not None:
            torch.testing.assert_close(made.double(), wanted, **tolerance)
        else:
            assert made.isnan().all()  # nothing was written


def test_a_shift_of_logits_and_infinite_ones(library):
    shape = (4, 3, 4)
    tensors = inputs_of(*shape[:2], torch.float64, "none")
    with torch.no_grad():
        tensors[3].copy_(torch.tensor([[800.0, 801, 0], [-900, -901, -902], [-torch.inf, 1, 2], [torch.inf, 1, 2]]))
    aux, _, _, _, grad = run(library, tensors, "none", shape, 1.0, with_z=True, z_weight=1.0)
    log_sum = torch.logsumexp(tensors[3].detach(), 1)
    assert torch.equal(aux, log_sum.square().mean()) and grad[:3].isfinite().all()
    torch.testing.assert_close(grad[:3], (torch.softmax(tensors[3].detach(), 1) * log_sum[:, None] / 2)[:3])


def test_more_experts_than_any_device_has_shared_memory_for_are_refused(library):
    for wide in (0, 1):  # before anything is launched: cudaErrorInvalidValue
        launch = BalanceLaunch(tokens=1, experts=MAX_EXPERTS_CUDA + 1, group_size=1, groups=1, chunks=1, wide=wide)
        assert library.swin_moe_balance_backward(ctypes.byref(launch), None) == 1


def test_the_most_experts_fit_the_shared_memory_of_any_device(library, monkeypatch):
    monkeypatch.setenv("SWIN_MOE_EMULATION_SHARED", str(48 << 10))  # what a launch has without asking
    shape = (3, MAX_EXPERTS_CUDA, 3)
    tensors = inputs_of(*shape[:2], torch.float64, "gshard")
    aux, balance, grad, *_ = run(library, tensors, "gshard", shape, 1.0, with_z=False, weight=1.0)
    assert torch.equal(aux, balance) and grad.isfinite().all()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "none"])
def test_bits_do_not_depend_on_the_order_of_threads(library, monkeypatch, kind):
    shape, found = SHAPES["groups in chunks, the last smaller"], []
    tensors = inputs_of(*shape[:2], torch.float32, kind)
    for order in ("0", "1"):
        monkeypatch.setenv("SWIN_MOE_EMULATION_REVERSE", order)
        found.append(run(library, tensors, kind, shape, 1.0, with_z=True))
    assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(*found))

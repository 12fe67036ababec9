"""The CUDA kernels of routing, run on the host, against the Python form: integers exactly, the rest by rounding."""

import ctypes

import pytest
import torch

from swin_moe.moe.losses import mean_entropy
from swin_moe.moe.routing import group_parts, join, route
from tests.csrc.emulation import build

POINTERS = (
    "clean noisy bias scores probabilities gate threshold entropy entropies confidence order expert slot demand kept "
    "totals before keep"
).split()
NUMBERS = ("tokens", "experts", "top_k", "group_size", "groups", "capacity", "last_capacity", "chunks")
FLAGS = ("sigmoid", "normalize", "wide")
GRADIENTS = (
    "grad_scores",
    "grad_probabilities",
    "grad_gate",
    "grad_threshold",
    "scores",
    "probabilities",
    "expert",
    "clean",
    "noisy",
)


class RouteLaunch(ctypes.Structure):
    """swin_moe::RouteLaunch."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in POINTERS]
        + [(n, ctypes.c_int64) for n in NUMBERS]
        + [(n, ctypes.c_int) for n in FLAGS]
    )


class RouteBackwardLaunch(ctypes.Structure):
    """swin_moe::RouteBackwardLaunch."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in GRADIENTS]
        + [(n, ctypes.c_int64) for n in NUMBERS[:3]]
        + [(n, ctypes.c_int) for n in FLAGS]
    )


CASES = {  # tokens, experts, choices, group size, capacity, of the smaller last group
    "one group": (300, 8, 1, 300, 30, 30),
    "two choices": (300, 8, 2, 300, 30, 30),
    "by need": (70, 5, 3, 70, None, None),
    "groups, the last smaller": (130, 7, 2, 40, 9, 3),
    "no slots": (40, 8, 1, 40, 0, 0),
    "one expert": (9, 1, 1, 9, 4, 4),
    "many experts": (12, 1030, 5, 12, 1, 1),
    "no token": (0, 4, 2, 1, 3, 3),
}


def pointers(tensors, names):
    return [None if tensors.get(name) is None else tensors[name].data_ptr() for name in names]


def run(library, clean, noisy, bias, case, *, sigmoid, normalize, prioritized):
    """Returns what the kernels write, by name; between the launches the order is sorted as the binding does."""
    tokens, experts, top_k, size, capacity, last = case
    groups, chunks = -(-tokens // size), -(-size * top_k // 256)
    real = {"dtype": clean.dtype}
    tensors = {"clean": clean, "noisy": noisy, "bias": bias}
    for name in ("scores", "probabilities"):
        tensors[name] = torch.full_like(clean, torch.nan)
    for name in ("threshold", "entropies", "confidence"):
        tensors[name] = torch.full((tokens,), torch.nan, **real)
    tensors["gate"] = torch.full((tokens, top_k), torch.nan, **real)
    tensors["entropy"] = torch.full((), torch.nan, **real)
    for name in ("expert", "slot"):
        tensors[name] = torch.full((tokens, top_k), -7)
    for name in ("demand", "kept"):
        tensors[name] = torch.full((groups, experts), -7)
    tensors["totals"] = torch.full((2 * experts + 1,), -7)
    tensors["before"] = torch.zeros(groups * chunks, experts, dtype=torch.int64)
    tensors["keep"] = torch.ones(tokens, top_k, dtype=torch.bool)
    limits = [-1 if limit is None else limit for limit in (capacity, last)]
    numbers = (tokens, experts, top_k, size, groups, *limits, chunks, sigmoid, normalize, clean.dtype == torch.float64)
    launch = RouteLaunch(*pointers(tensors, POINTERS), *numbers)
    assert library.swin_moe_route_choose(ctypes.byref(launch), None) == 0
    if prioritized:
        parts = tensors["confidence"].split(size) if tokens else []
        tensors["order"] = torch.cat([p.sort(descending=True, stable=True).indices for p in parts] or [torch.arange(0)])
    launch = RouteLaunch(*pointers(tensors, POINTERS), *numbers)
    assert library.swin_moe_route_slots(ctypes.byref(launch), None) == 0
    return tensors


def expected_routing(noisy, scores, bias, case, *, normalize, prioritized):
    """Returns the reference's routing of given scores, part by part."""
    tokens, _, top_k, size, *capacities = case
    parts, routings, first = group_parts(tokens, size), [], 0
    for number, (count, own) in enumerate(parts):
        rows = slice(first, first + count)
        capacity = capacities[1 if number else 0]
        routings.append(
            route(
                noisy[rows],
                top_k=top_k,
                capacity=capacity,
                group_size=own,
                scores=scores[rows],
                bias=bias,
                batch_prioritized=prioritized,
                normalize_gate=normalize,
            )
        )
        first += count
    return join(routings)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_python_form(monkeypatch, case, prioritized, sigmoid, dtype, backwards):
    if backwards:
        monkeypatch.setenv("SWIN_MOE_EMULATION_REVERSE", "1")
    library, (tokens, experts, top_k, *_) = build(), case
    generator = torch.Generator().manual_seed(1)
    # Few values, so that scores tie.
    clean = torch.randint(-2, 3, (tokens, experts), generator=generator).to(dtype)
    noisy = clean + torch.randint(0, 2, (tokens, experts), generator=generator).to(dtype)
    bias = torch.randint(0, 2, (experts,), generator=generator).to(dtype) if sigmoid else None
    found = run(library, clean, noisy, bias, case, sigmoid=sigmoid, normalize=True, prioritized=prioritized)
    inputs = [clean.requires_grad_(), noisy.requires_grad_()]
    scores = torch.sigmoid(noisy) if sigmoid else torch.softmax(noisy, 1)
    probabilities = torch.softmax(clean, 1)
    torch.testing.assert_close(found["scores"], scores)
    if not sigmoid:
        torch.testing.assert_close(found["probabilities"], probabilities)
    shown = scores + (found["scores"] - scores).detach()  # ties are by the kernel's scores
    expected = expected_routing(noisy, shown, bias, case, normalize=True, prioritized=prioritized)
    for name in ("expert", "slot", "keep", "demand", "kept"):
        assert torch.equal(found[name], getattr(expected, name)), name
    demand, kept = expected.demand.sum(0), expected.kept.sum(0)
    assert torch.equal(found["totals"], torch.cat([demand, kept, (demand - kept).sum()[None]]))
    torch.testing.assert_close(found["gate"], expected.gate)
    threshold = noisy.gather(1, expected.expert[:, -1:]).squeeze(1)
    assert torch.equal(found["threshold"], threshold)
    entropy = mean_entropy(clean if sigmoid else probabilities, logits=sigmoid)
    torch.testing.assert_close(found["entropy"], entropy)

    grads = {
        "grad_scores": torch.randn(scores.shape, generator=generator, dtype=dtype),
        "grad_probabilities": None if sigmoid else torch.randn(scores.shape, generator=generator, dtype=dtype),
        "grad_gate": torch.randn(tokens, top_k, generator=generator, dtype=dtype),
        "grad_threshold": torch.randn(tokens, generator=generator, dtype=dtype),
    }
    outputs = (shown, None if sigmoid else probabilities, expected.gate, threshold)
    loss = sum((value * grad).sum() for value, grad in zip(outputs, grads.values()) if grad is not None)
    of_clean, of_noisy = torch.autograd.grad(loss, inputs, allow_unused=True)
    saved = {name: found[name] for name in ("scores", "probabilities", "expert")}
    made = {"noisy": torch.full_like(scores, torch.nan)}
    made["clean"] = None if sigmoid else torch.full_like(scores, torch.nan)
    launch = RouteBackwardLaunch(
        *pointers(grads | saved | made, GRADIENTS), tokens, experts, top_k, sigmoid, True, dtype == torch.float64
    )
    assert library.swin_moe_route_backward(ctypes.byref(launch), None) == 0
    torch.testing.assert_close(made["noisy"], of_noisy)
    if not sigmoid:
        torch.testing.assert_close(made["clean"], of_clean)


@pytest.mark.parametrize("top_k", [1, 3])
def test_not_a_number_is_chosen_as_torch_max_does(top_k):
    logits = torch.rand(40, 37, generator=torch.Generator().manual_seed(5))
    logits[3, 1], logits[4, 34], logits[5] = torch.nan, torch.nan, torch.nan
    logits[4, 2] = torch.nan
    bias = torch.zeros(37)
    bias[2] = -torch.inf
    case = (40, 37, top_k, 40, 2, 2)
    for offset in (None, bias):
        found = run(build(), logits, logits, offset, case, sigmoid=True, normalize=False, prioritized=True)
        options = {"normalize": False, "prioritized": True}
        expected = expected_routing(logits, found["scores"], offset, case, **options)
        for name in ("expert", "slot", "keep"):
            assert torch.equal(found[name], getattr(expected, name)), name

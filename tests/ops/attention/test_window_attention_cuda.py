"""The CUDA kernels of window attention on a device: errors against float64, determinism, streams, contracts."""

import pytest
import torch

from swin_moe.ops import extension
from swin_moe.ops.attention.fused import fused_window_attention
from tests.csrc.window.test_window_kernels import DTYPES, VARIANTS, check
from tests.ops.attention.window_attention_cases import Case, check_against_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not extension.available("cuda"), reason="the CUDA kernels were not built"),
]
OPERATOR = torch.ops.swin_moe.window_attention


def on_device(*arguments):
    """Returns what the operator gives on the device, on the host; differentiable."""
    return OPERATOR(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_as_exact_as_eager(case, dtype):
    check(case, dtype, on_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_shapes_are_as_exact_as_eager(dtype):
    check_against_eager(range(60), dtype, operator=on_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_windows_are_as_exact_as_eager(dtype):
    """More blocks than fit the device at a time, so that they come in any order."""
    for case in (
        Case(8, 56, 56, 6, 32, (7, 7), (3, 3), cosine=False, pad=False),
        Case(4, 64, 64, 4, 32, (16, 16), (8, 8), cosine=True, pad=False),
    ):
        check(case, dtype, on_device)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_have_the_same_bits_every_time(name):
    case = VARIANTS[name]
    tensors = [None if t is None else t.cuda().requires_grad_() for t in case.tensors(2, torch.bfloat16)]
    results = []
    for _ in range(3):
        out = OPERATOR(*tensors, *case.numbers)
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), [t for t in tensors if t is not None])])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["window 12", "window 16", "window 24"])
def test_what_the_forward_keeps_changes_no_bit(name, dtype):
    """fused_window_attention keeps row sums for some windows; the plain operator computes them again."""
    case, results = VARIANTS[name], []
    for operator in (OPERATOR, lambda *t: torch.ops.swin_moe.window_attention_and_sums(*t)[0]):
        tensors = [None if t is None else t.cuda().requires_grad_() for t in case.tensors(4, dtype)]
        out = operator(*tensors, *case.numbers)
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), [t for t in tensors if t is not None])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_runs_on_the_current_stream():
    case, stream = VARIANTS["window 16"], torch.cuda.Stream()
    tensors = [None if t is None else t.cuda() for t in case.tensors(3, torch.bfloat16)]
    expected = OPERATOR(*tensors, *case.numbers)
    late = torch.zeros_like(tensors[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: what follows on another stream would read zeros
        late.copy_(tensors[0])
        out = OPERATOR(late, *tensors[1:], *case.numbers)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_is_captured_in_a_graph():
    case = VARIANTS["window 8"]
    tensors = [None if t is None else t.cuda().requires_grad_() for t in case.tensors(4, torch.bfloat16)]
    given = [t for t in tensors if t is not None]

    def step():
        return torch.autograd.grad(OPERATOR(*tensors, *case.numbers).float().square().sum(), given)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    case = VARIANTS["any, 16"]
    tensors = [t.cuda().requires_grad_() for t in case.tensors(5, dtype)]
    torch.library.opcheck(OPERATOR.default, (*tensors, *case.numbers))


def test_compiles_without_a_break():
    def block(qkv, table):
        return fused_window_attention(qkv * 2, table, num_heads=2, window=(4, 4), shift=(2, 2)).square()

    qkv = torch.randn(2, 8, 12, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(49, 2, device="cuda", requires_grad=True)
    results = []
    for run in (block, torch.compile(block, fullgraph=True)):
        out = run(qkv, table)
        results.append([out, *torch.autograd.grad(out.float().sum(), (qkv, table))])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


def test_float64_is_refused_by_name():
    with pytest.raises(TypeError, match="float32, bfloat16 or float16 on CUDA"):
        OPERATOR(*(t.cuda() for t in VARIANTS["any, 16"].tensors()), *VARIANTS["any, 16"].numbers)

"""The map operator: values and gradients against float64, its schema, fake kernels, tracing, autocast."""

import os
import subprocess
import sys

import pytest
import torch

from swin_moe.ops import extension
from swin_moe.ops.attention import fused as window_attention
from swin_moe.ops.attention.fused import SCHEMAS, fused_window_attention, unsupported
from swin_moe.ops.attention.reference import attend_map
from tests.ops.attention.window_attention_cases import (
    FLOORS,
    MANY,
    Case,
    check_against_eager,
    errors,
    formula,
    relative_error,
    value_and_gradients,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPERATOR = torch.ops.swin_moe.window_attention
WITH_SUMS = torch.ops.swin_moe.window_attention_and_sums
SMALL = {
    "dot": Case(2, 4, 6, 2, 8, (2, 3), (1, 1), cosine=False, pad=False),
    "cosine": Case(2, 4, 6, 2, 8, (2, 3), (1, 2), cosine=True, pad=False),
    "padded": Case(1, 5, 7, 1, 8, (3, 4), (1, 2), cosine=False, pad=True),
    "padded_cosine": Case(1, 5, 4, 2, 9, (3, 3), (0, 1), cosine=True, pad=True),
    "padded_with_zeros": Case(1, 3, 3, 1, 8, (2, 2), (1, 0), cosine=True, pad=False),
    "one_window_shifted": Case(2, 4, 4, 1, 8, (4, 4), (2, 2), cosine=False, pad=False),
    "window_beyond_the_map": Case(1, 2, 3, 1, 8, (4, 5), (0, 0), cosine=False, pad=True),
    "one_token": Case(1, 1, 2, 2, 8, (1, 1), (0, 0), cosine=True, pad=False),
}


@pytest.mark.parametrize("name", SMALL)
def test_reference_and_operator_equal_the_formula(name):
    case = SMALL[name]
    tensors = case.tensors()
    weight = torch.randn(case.batch, case.height, case.width, case.heads * case.head_dim, dtype=torch.float64)
    expected = value_and_gradients(lambda *t: formula(case, *t), tensors, weight)
    for attend in (lambda *t: attend_map(*t, numbers=case.numbers), lambda *t: OPERATOR(*t, *case.numbers)):
        found = value_and_gradients(attend, tensors, weight)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_shapes_are_as_exact_as_eager(dtype):
    check_against_eager(range(60), dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_random_shapes_are_as_exact_as_eager(dtype):
    check_against_eager(range(60, 560), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 4, 6, 8, 10, 12, 13, 16, 18, 20, 22])
def test_rows_of_every_length_are_as_exact_as_eager(rows, dtype):
    # With AVX-512 rows of scores of one to ten vectors of float32 stay in registers, longer ones do not.
    for cosine in (False, True):
        case = Case(1, 2 * rows - 1, 8, 2, 32, (rows, 8), (rows // 2, 0), cosine, pad=True)
        for name, (ours, eager, size) in errors(case, dtype, rows).items():
            assert size < MANY or ours <= 1.5 * eager + FLOORS[dtype], (name, ours, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [8, 18, 22])
def test_scores_far_apart_and_what_is_no_number(rows, dtype):
    case = Case(1, rows, 8, 2, 32, (rows, 8), (0, 0), cosine=False, pad=False)
    qkv, table, *rest = case.tensors(dtype=dtype)
    table *= 60.0  # most weights are below the smallest number
    expected = attend_map(qkv.double(), table.double(), *rest, numbers=case.numbers)
    eager = relative_error(attend_map(qkv, table, *rest, numbers=case.numbers), expected)
    assert relative_error(OPERATOR(qkv, table, *rest, *case.numbers), expected) <= 1.5 * eager + FLOORS[dtype]
    qkv[0, 1, 2, 5] = torch.nan  # a query of the first head
    found = OPERATOR(qkv, table, *rest, *case.numbers)
    wrong = torch.zeros(1, rows, 8, 64, dtype=torch.bool)
    wrong[0, 1, 2, :32] = True
    assert torch.equal(found.isnan(), wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_queries_and_keys_are_divided_by_the_smallest_length(dtype):
    case = Case(1, 4, 4, 2, 16, (4, 4), (0, 0), cosine=True, pad=False)
    tensors = case.tensors(dtype=dtype)
    tensors[0][0, 1] = 0.0  # a row of four tokens without queries, keys and values
    weight = torch.randn(1, 4, 4, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = value_and_gradients(lambda *t: OPERATOR(*t, *case.numbers), tensors, weight)
    eager = value_and_gradients(lambda *t: attend_map(*t, numbers=case.numbers), tensors, weight)
    wide = [None if t is None else t.double() for t in tensors]
    exact = value_and_gradients(lambda *t: attend_map(*t, numbers=case.numbers), wide, weight.double())
    # Gradients of zero rows are 1e12 times as long as the others, so each kind is compared for itself.
    parts = {"zero": (0, 1), "rest": (0, [0, 2, 3])}
    for part, index in parts.items():
        error = relative_error(ours["qkv"][index], exact["qkv"][index])
        assert error <= 1.5 * relative_error(eager["qkv"][index], exact["qkv"][index]) + 1e-6, part
    for name in ("out", "bias_table"):
        error = relative_error(ours[name], exact[name])
        assert error <= 1.5 * relative_error(eager[name], exact[name]) + 1e-6, name
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-1}[dtype]  # a sum that cancels
    assert relative_error(ours["logit_scale"], exact["logit_scale"]) <= rounding


@pytest.mark.parametrize("batch", [0, 1])
def test_no_image_gives_an_empty_map_and_zero_gradients(batch):
    case = Case(batch, 4, 4, 2, 8, (2, 2), (1, 1), cosine=True, pad=True)
    found = value_and_gradients(lambda *t: OPERATOR(*t, *case.numbers), case.tensors(), torch.zeros(batch, 4, 4, 16))
    assert found.pop("out").shape == (batch, 4, 4, 16)
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", SCHEMAS)
def test_python_and_library_agree_about_the_schema(name):
    ours = str(torch._C.parse_schema(f"swin_moe::{SCHEMAS[name]}"))
    assert str(getattr(torch.ops.swin_moe, name).default._schema) == ours


@pytest.mark.parametrize("name", ["dot", "cosine", "padded", "padded_cosine"])
def test_gradcheck(name):
    case = SMALL[name]
    tensors = [None if t is None else t.requires_grad_() for t in case.tensors()]
    given = [t for t in tensors if t is not None]

    def attend(*values):
        values = iter(values)
        return OPERATOR(*(None if t is None else next(values) for t in tensors), *case.numbers)

    assert torch.autograd.gradcheck(attend, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dot", "padded_cosine"])
def test_opcheck(name, dtype):
    case = SMALL[name]
    tensors = [None if t is None else t.requires_grad_() for t in case.tensors(dtype=dtype)]
    torch.library.opcheck(OPERATOR, (*tensors, *case.numbers), atol=1e-2, rtol=1e-2)
    plain = [None if t is None else t.detach() for t in tensors]
    grad = torch.ones(case.batch, case.height, case.width, case.heads * case.head_dim, dtype=dtype)
    utilities = ("test_schema", "test_faketensor")  # it has no second derivative
    torch.library.opcheck(
        torch.ops.swin_moe.window_attention_backward, (grad, *plain, *case.numbers), test_utils=utilities
    )


@pytest.mark.parametrize("name", ["dot", "padded_cosine"])
def test_the_operator_that_keeps_sums_is_the_same_operator(name):
    case, results = SMALL[name], []
    for attend in (OPERATOR, lambda *t: WITH_SUMS(*t)[0]):
        tensors = [None if t is None else t.requires_grad_() for t in case.tensors()]
        out = attend(*tensors, *case.numbers)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [t for t in tensors if t is not None])])
    # Forward by the reference here and by a kernel there: the same numbers to their last bits.
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    windows, tokens = {"dot": (8, 6), "padded_cosine": (4, 9)}[name]
    assert WITH_SUMS(*tensors, *case.numbers)[1].shape == (windows, case.heads, tokens)
    torch.library.opcheck(WITH_SUMS, (*tensors, *case.numbers))


def test_row_sums_are_kept_where_a_backward_kernel_reads_them(monkeypatch):
    monkeypatch.setattr(extension, "COMPILED", frozenset({"cpu", "cuda"}))
    reads = window_attention._backward_reads_sums
    assert reads("cuda", torch.bfloat16, 32, (16, 16)) and reads("cuda", torch.float16, 32, (12, 12))
    assert not reads("cuda", torch.float32, 32, (16, 16)) and not reads("cuda", torch.bfloat16, 32, (8, 8))
    assert not reads("cuda", torch.bfloat16, 24, (16, 16)) and not reads("cpu", torch.bfloat16, 32, (16, 16))
    monkeypatch.setattr(extension, "COMPILED", frozenset({"cpu"}))
    assert not reads("cuda", torch.bfloat16, 32, (16, 16))


@pytest.mark.parametrize("differentiated", [True, False])
def test_row_sums_are_kept_only_for_a_backward(monkeypatch, differentiated):
    monkeypatch.setattr(window_attention, "_backward_reads_sums", lambda *_: True)
    case, called = SMALL["dot"], []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    qkv, table, *_ = case.tensors()
    with Record():
        out = fused_window_attention(
            qkv.requires_grad_(differentiated), table, num_heads=case.heads, window=case.window, shift=case.shift
        )
    assert out.requires_grad == differentiated
    assert ("swin_moe::window_attention_and_sums" in called) == differentiated
    assert ("swin_moe::window_attention" in called) != differentiated


def test_second_derivatives_are_refused():
    case = SMALL["dot"]
    tensors = case.tensors()
    tensors[0].requires_grad_()
    out = OPERATOR(*tensors, *case.numbers)
    (gradient,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def test_meta_tensors_have_the_shapes_of_results():
    case = SMALL["padded_cosine"]
    tensors = [None if t is None else t.to("meta").requires_grad_() for t in case.tensors()]
    out = OPERATOR(*tensors, *case.numbers)
    out.sum().backward()
    assert out.shape == (1, 5, 4, 18)
    assert all(t.grad.shape == t.shape for t in tensors)


def attend_with_linear(x, weight, bias, table):
    qkv = torch.nn.functional.linear(x, weight, bias)
    out = fused_window_attention(
        qkv, table, num_heads=2, window=(4, 4), shift=(2, 2), scale=0.3, pad_qkv=bias.to(qkv.dtype)
    )
    return torch.nn.functional.gelu(out)


def linear_tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((48, 16), (48,), (49, 2))
    return [torch.randn(size, generator=generator).mul_(0.1).requires_grad_() for size in sizes]


def test_one_program_for_five_resolutions_is_compiled_few_times():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(attend_with_linear, backend=backend, fullgraph=True)
    weights = linear_tensors()
    for height, width in ((8, 8), (12, 8), (9, 14), (16, 16), (5, 7)):
        x = torch.randn(2, height, width, 16, generator=torch.Generator().manual_seed(height))
        torch.testing.assert_close(compiled(x, *weights), attend_with_linear(x, *weights))
    assert 1 <= len(graphs) <= 3  # one static, one dynamic, one more for square maps
    torch._dynamo.reset()


def test_forward_and_backward_compile_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(attend_with_linear, backend="aot_eager", fullgraph=True)
    weights, x = linear_tensors(), torch.randn(2, 9, 14, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(attend_with_linear(x, *weights).square().sum(), weights)
    found = torch.autograd.grad(compiled(x, *weights).square().sum(), weights)
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


class Attend(torch.nn.Module):
    def __init__(self):
        super().__init__()
        weights = map(torch.nn.Parameter, linear_tensors())
        self.weight, self.bias, self.table = weights

    def forward(self, x):
        return attend_with_linear(x, self.weight, self.bias, self.table)


def test_export_keeps_the_operator_with_dynamic_sizes():
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    module, x = Attend(), torch.randn(2, 8, 12, 16)
    program = torch.export.export(module, (x,), dynamic_shapes=(sizes,))
    assert any(node.target is OPERATOR.default for node in program.graph.nodes)
    other = torch.randn(3, 9, 7, 16)
    torch.testing.assert_close(program.module()(other), module(other))


def test_autocast_gives_half_precision_and_float32_gradients_of_parameters():
    weights, x = linear_tensors(), torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_with_linear(x, *weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend_with_linear(x, *weights), rtol=0.05, atol=0.02)
    out.float().sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in weights)


def test_float32_stays_float32_under_autocast():
    case = SMALL["cosine"]
    tensors = case.tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = OPERATOR(*tensors, *case.numbers)
    assert torch.equal(found, OPERATOR(*tensors, *case.numbers))


def test_inputs_need_not_be_contiguous():
    case = SMALL["dot"]
    qkv, table, *_ = case.tensors()
    strided = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    options = {"num_heads": 2, "window": case.window, "shift": case.shift, "scale": 0.3}
    assert not strided.is_contiguous()
    expected = fused_window_attention(qkv, table, **options)
    assert torch.equal(fused_window_attention(strided, table, **options), expected)


def test_what_compiled_kernels_do_not_compute(monkeypatch):
    fits = {"device_type": "cpu", "dtype": torch.float32, "head_dim": 32, "window": (7, 7)}
    monkeypatch.setattr(extension, "COMPILED", frozenset({"cpu", "cuda"}))
    assert unsupported(**fits) is None
    assert unsupported(**fits, table_dtype=torch.float32) is None
    assert "bfloat16, neither float32" in unsupported(**fits, table_dtype=torch.bfloat16)
    assert "65 channels a head are not in [8, 64]" in unsupported(**fits | {"head_dim": 65})
    assert "7 channels a head" in unsupported(**fits | {"head_dim": 7})
    assert unsupported(**fits | {"window": (32, 32)}) is None
    assert "32 x 33 has more than 1024 tokens" in unsupported(**fits | {"window": (32, 33)})
    assert unsupported(**fits | {"dtype": torch.float64}) is None
    assert "float64 is none of" in unsupported(**fits | {"dtype": torch.float64, "device_type": "cuda"})
    monkeypatch.setattr(extension, "COMPILED", frozenset())
    assert unsupported(**fits).startswith("no compiled kernels: ")


PROGRAM = """
import torch
from swin_moe.ops import extension
from tests.ops.attention.window_attention_cases import check_against_eager
assert not extension.available("cpu") and extension.why_not("cpu") == "SWIN_MOE_NO_EXT=1 is set"
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    check_against_eager(range(8), dtype)
"""


def test_without_the_library_the_reference_runs():
    environment = {**os.environ, "SWIN_MOE_NO_EXT": "1", "SWIN_MOE_REQUIRE_EXT": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

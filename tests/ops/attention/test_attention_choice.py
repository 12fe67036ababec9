"""model.attention=auto: what is measured and what not, what is kept, and that a measurement leaves no trace."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from swin_moe import choice_cache
from swin_moe.ops import extension
from swin_moe.ops.attention import choice as choices
from swin_moe.ops.attention.choice import Case, choose_path, fastest, measure
from swin_moe.ops.attention.half import PATHS, HalfShape, HalfTensors, attention_half
from swin_moe.ops.device_clock import device_seconds

SHAPE = HalfShape(2, (4, 4), (2, 2), 0.25)
CASE = Case(
    "cpu",
    "float32",
    "float32",
    "float32",
    "float32",
    (4, 4),
    2,
    16,
    qkv_bias=True,
    cosine=False,
    shifted=True,
    padded=False,
    gradients=True,
    windows=8,
)


def tensors(dtype: torch.dtype = torch.float32, *, cosine: bool = False) -> HalfTensors:
    generator = torch.Generator().manual_seed(0)
    sizes = ((96, 32), (96,), (32, 32), (32,), (49, 2), (2, 1, 1))
    drawn = [torch.randn(size, generator=generator).mul_(0.2).to(dtype).requires_grad_() for size in sizes]
    qkv, qkv_bias, proj, proj_bias, table, scale = drawn
    return HalfTensors(qkv, qkv_bias, proj, proj_bias, table, scale if cosine else None)


def a_map(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(2, height, width, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Turns measuring on for any size, with a directory of its own, and returns the cases that were measured."""
    monkeypatch.setattr(choices.Measuring, "enabled", True)
    monkeypatch.setattr(choices, "SMALLEST_MACS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, original = [], choices.measure
    monkeypatch.setattr(choices, "measure", lambda case: measured.append(case) or original(case))
    return measured


@pytest.fixture(autouse=True)
def forget():
    """Lets every test be a process that has chosen nothing yet, and leaves nothing to the next."""
    start_again()
    yield
    start_again()


def start_again():
    choices._decide.cache_clear(), choices._measured.cache_clear()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_every_path_gives_the_same_values_and_gradients(cosine, size):
    given = tensors(torch.float64, cosine=cosine)
    x = a_map(*size).double().requires_grad_()
    leaves = [x, *(t for t in given if t is not None)]
    weight = torch.randn(2, *size, 32, dtype=torch.float64)
    expected = attention_half(x, given, SHAPE, "reference")
    gradients = torch.autograd.grad(expected, leaves, weight)
    for path in PATHS:
        found = attention_half(x, given, SHAPE, path)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, leaves, weight), gradients)


def test_without_a_bias_padded_tokens_are_zero():
    given, x = tensors()._replace(qkv_bias=None), a_map(6, 9)
    torch.testing.assert_close(attention_half(x, given, SHAPE, "fused"), attention_half(x, given, SHAPE, "reference"))


def test_the_first_stays_unless_another_is_faster_by_the_margin_in_every_round():
    assert fastest({"fused": [1.09, 1.2], "sdpa": [1.0, 1.0], "reference": [5.0, 5.0]}) == "fused"
    assert fastest({"fused": [1.2, 1.3], "sdpa": [1.05, 1.1], "reference": [1.0, 1.0]}) == "reference"
    assert fastest({"fused": [9.0, 1.0], "sdpa": [1.0, 1.0]}) == "fused"
    assert fastest({"fused": [2.0]}) == "fused"


@pytest.mark.parametrize("path", ["sdpa", "reference", "analytic"])
def test_a_path_that_is_asked_for_runs(path):
    assert choose_path(path, a_map(), tensors(), SHAPE) == path
    half = choose_path(path, a_map().bfloat16(), tensors(torch.bfloat16), SHAPE)
    assert half == ("reference" if path == "analytic" else path)


def test_fused_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(extension, "COMPILED", frozenset({"cpu"}))
    assert choose_path("fused", a_map(), tensors(), SHAPE) == "fused"
    wide = HalfShape(2, (33, 32), (0, 0), 0.25)
    with pytest.raises(ValueError, match="fused cannot run: a window of 33 x 32 has more than 1024 tokens"):
        choose_path("fused", a_map(), tensors(), wide)
    monkeypatch.setattr(extension, "COMPILED", frozenset())
    with pytest.raises(ValueError, match="cannot run: no compiled kernels: .*; use model.attention=auto"):
        choose_path("fused", a_map(), tensors(), SHAPE)


@pytest.mark.parametrize("kernels", [{"cpu"}, set()])
@pytest.mark.parametrize("where", ["off", "small", "no image", "meta", "compiling"])
def test_nothing_is_measured(monkeypatch, measuring, kernels, where):
    monkeypatch.setattr(extension, "COMPILED", frozenset(kernels))
    monkeypatch.setattr(extension, "why_not", lambda device: "none here")
    x, given = a_map(), tensors()
    if where == "off":
        monkeypatch.setattr(choices.Measuring, "enabled", False)
    elif where == "small":
        monkeypatch.setattr(choices, "SMALLEST_MACS", 10**12)
    elif where == "no image":
        x = x[:0]
    elif where == "meta":
        x, given = x.to("meta"), HalfTensors(*(None if t is None else t.to("meta") for t in given))
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = "fused" if kernels or where == "meta" else "analytic"
    assert choose_path("auto", x, given, SHAPE) == plain
    assert not measuring


def test_fake_tensors_are_not_measured(measuring):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 8, 8, 32)
        choose_path("auto", x, tensors(), SHAPE)
    assert not measuring


def test_a_case_is_measured_once_and_kept(monkeypatch, measuring):
    x, given = a_map(), tensors()
    first = choose_path("auto", x, given, SHAPE)
    assert first in PATHS and len(measuring) == 1
    assert choose_path("auto", a_map(), given, SHAPE) == first and len(measuring) == 1
    with torch.no_grad():
        choose_path("auto", x, given, SHAPE)
    assert [case.gradients for case in measuring] == [True, False]
    choose_path("auto", a_map(7, 8), given, SHAPE)
    assert [case.padded for case in measuring] == [False, False, True]
    start_again()
    assert choose_path("auto", x, given, SHAPE) == first and len(measuring) == 3


def test_the_first_to_write_decides(monkeypatch, measuring):
    """Another process wrote its choice while this one measured."""
    directory, kept = choice_cache.default_directory(), []

    def slow_measure(case):
        contenders = case.contenders
        (key,) = kept
        choice_cache.write(directory, key, {"choice": contenders[-1]}, option=choices.OPTION)
        return {path: [1.0] for path in contenders}, 1

    original = choice_cache.path_of

    def path_of(directory, key):
        kept[:] = [key]
        return original(directory, key)

    monkeypatch.setattr(choice_cache, "path_of", path_of)
    monkeypatch.setattr(choices, "measure", slow_measure)
    assert choose_path("auto", a_map(), tensors(), SHAPE) == CASE.contenders[-1] != CASE.contenders[0]


def test_a_broken_file_is_replaced(measuring):
    choose_path("auto", a_map(), tensors(), SHAPE)
    (file,) = choice_cache.default_directory().glob("*.json")
    good = file.read_text()
    file.write_text(good[:30])
    start_again()
    choose_path("auto", a_map(), tensors(), SHAPE)
    assert len(measuring) == 2 and file.read_text().startswith(good[:30]) and len(file.read_text()) > 100


def test_a_measurement_that_fails_ends_no_run(monkeypatch, measuring, caplog):
    def fail(case):
        raise torch.OutOfMemoryError("no memory\nfor this")

    monkeypatch.setattr(choices, "measure", fail)
    logger = logging.getLogger("swin_moe")
    logger.addHandler(caplog.handler)
    try:
        found = choose_path("auto", a_map(), tensors(), SHAPE)
    finally:
        logger.removeHandler(caplog.handler)
    assert found == CASE.contenders[0] and "not measured (no memory)" in caplog.text


def test_a_measurement_leaves_no_trace(measuring):
    given, x, state = tensors(), a_map(), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choose_path("auto", x, given, SHAPE)
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    with torch.inference_mode():
        choose_path("auto", x, given, SHAPE)
        assert torch.is_inference_mode_enabled()
    assert [(case.dtype, case.gradients) for case in measuring] == [("bfloat16", True), ("float32", False)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(t.grad is None for t in given if t is not None)


def test_a_recomputed_block_measures_outside_its_graph(measuring):
    """What a measurement saves for its own backward must not be counted among what the block saves."""
    given = tensors()

    def block(x):
        return attention_half(x, given, SHAPE, choose_path("auto", x, given, SHAPE))

    x = a_map().requires_grad_()
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(measuring) == 1 and x.grad is not None


def test_a_measured_map_has_the_windows_it_says():
    for windows in (1, 2, 8, 64, 256):
        x, shape = choices._random_map(CASE, windows, torch.device("cpu"))
        rows, columns = x.shape[1] // 4, x.shape[2] // 4
        assert len(x) * rows * columns == windows and rows <= columns <= 8 and shape.shift == (2, 2)


def test_work_is_counted_by_hand():
    # 8 windows of 16 tokens and 32 channels: 4 * 32 ** 2 for the projections, 2 * 16 * 32 for scores and values.
    assert CASE.macs == 3 * 8 * 16 * (4 * 32**2 + 2 * 16 * 32)


def test_times_of_all_contenders_are_measured():
    rounds, windows = measure(CASE)
    assert next(iter(rounds)) == CASE.contenders[0] and 1 <= windows <= 8
    assert all(len(times) == choices.ROUNDS and 0 < min(times) <= max(times) < 10 for times in rounds.values())


LAUNCHES = {"fused": 1.0, "sdpa": 9.0, "analytic": 9.0, "reference": 20.0}  # what a device takes at least, per path
PER_WINDOW = {"fused": 4.0, "sdpa": 1.0, "analytic": 3.0, "reference": 9.0}


def test_a_device_is_measured_at_the_size_of_the_case(monkeypatch):
    """With one window fused takes half the time of sdpa, with all 64 more than twice: few windows must not choose."""
    case, seen = replace(CASE, windows=64), set()

    def seconds(path, x, given, shape, gradients):
        windows = x.shape[0] * x.shape[1] * x.shape[2] // 16
        seen.add(windows)
        return max(LAUNCHES[path], PER_WINDOW[path] * windows)

    monkeypatch.setattr(choices, "_seconds", seconds)
    rounds = choices._measure_at_size(case, choices._random_tensors(case, torch.device("cpu")))
    assert seen == {64} and fastest(rounds) == "sdpa"
    # The first stays to be compared with; of the others, what takes more than twice the fastest is not measured on.
    assert rounds == {"fused": [256.0] * choices.ROUNDS, "sdpa": [64.0] * choices.ROUNDS}


def test_a_path_that_does_not_fit_is_left_out(monkeypatch):
    given = choices._random_tensors(CASE, torch.device("cpu"))

    def seconds(path, *_):
        if path in too_large:
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    monkeypatch.setattr(choices, "_seconds", seconds)
    too_large = {"reference"}
    assert set(choices._measure_at_size(CASE, given)) == set(CASE.contenders) - too_large
    too_large = {CASE.contenders[0]}
    with pytest.raises(torch.OutOfMemoryError):
        choices._measure_at_size(CASE, given)


def test_a_device_is_timed_over_calls_between_two_events(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 6000.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert device_seconds(lambda: happened.append("call"), choices.CALLS) == 6.0 / choices.CALLS
    assert happened == ["record", *["call"] * choices.CALLS, "record", "wait"]


@pytest.mark.gpu
def test_a_case_is_measured_on_a_device():
    case = replace(CASE, device="cuda:0", dtype="bfloat16", window=(8, 8), head_dim=32, windows=64)
    rounds, windows = measure(case)
    assert windows == 64 and all(0 < time < 10 for times in rounds.values() for time in times)

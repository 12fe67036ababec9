"""gpu_smoke.py on the CPU's kernels: all are right, wrong ones are seen, and nothing that tests know is left out."""

import dataclasses

import gpu_smoke
import pytest
import smoke_cases
import smoke_experts
import torch
from smoke_problem import Case, Problem

from swin_moe.ops import extension
from swin_moe.ops.attention import fused
from tests.csrc.window.test_window_kernels import VARIANTS

CPU = torch.device("cpu")
QUICK = (
    "window 7, bf16",
    "any, 48, fp32",
    "large, 32, fp16",
    "window_shift",
    "moe",
    "grouped",
    "draws",
    "row sums",
    "nms",
    "roi_align",
    "deform",
)


def of_size(name: str) -> Problem:
    (case,) = (case for case in smoke_cases.cases() if case.name == name)
    return case.make(CPU, "small")


@pytest.mark.skipif(not extension.available("cpu"), reason="the kernels were not built")
def test_the_kernels_here_are_right(capsys):
    chosen = [case for case in smoke_cases.cases() if any(part in case.name for part in QUICK)]
    assert gpu_smoke.run(chosen, CPU, "small", 1) == ([], len(chosen))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(chosen) and all(" ok " in line and " ms" in line for line in lines)
    for name in ("window_attention", "window_attention_backward", "window_partition", "grouped_linear_backward"):
        assert name in gpu_smoke.Called.names
    assert not {"window_attention", "window_merge", "grouped_linear"} & set(
        gpu_smoke.without_a_case(CPU, gpu_smoke.Called.names)
    )


@pytest.mark.parametrize("window", [12, 16])
def test_backward_runs_with_row_sums_and_without(monkeypatch, window):
    monkeypatch.setattr(fused, "_backward_reads_sums", lambda *_: True)  # as on CUDA
    for kind, with_sums in (("cosine shifted padded", True), ("without row sums", False)):
        monkeypatch.setattr(gpu_smoke.Called, "names", set())
        problem = of_size(f"window {window}, bf16, {kind}")
        with gpu_smoke.Called():
            gpu_smoke.results(problem.ours, problem)
        forward = "window_attention_and_sums" if with_sums else "window_attention"
        assert gpu_smoke.Called.names == {forward, "window_attention_backward"}


def test_every_variant_that_has_a_test_has_a_case():
    def kernel(head_dim, window):
        constant = head_dim == 32 and window[0] == window[1] and window[0] in (7, 8, 12, 16, 24)
        return window if constant else (-(-head_dim // 16), window[0] * window[1] > 64)

    cases = {kernel(shape.head_dim, shape.window) for shape in smoke_cases.WINDOWS}
    assert {kernel(case.head_dim, case.window) for case in VARIANTS.values()} <= cases


@pytest.mark.parametrize("error", ["scaled", "nan", "one number"])
@pytest.mark.parametrize("where", ["value", "gradient"])
def test_a_wrong_result_is_seen(error, where):
    problem = of_size("window 8, fp32, dot")

    def spoil(x):
        if error == "one number":
            return x + torch.zeros_like(x).index_fill_(0, torch.tensor([0]), 1e-2)
        return x * (1.001 if error == "scaled" else float("nan"))

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return spoil(x) if where == "value" else x.clone()

        @staticmethod
        def backward(ctx, grad):
            return spoil(grad) if where == "gradient" else grad

    wrong = dataclasses.replace(problem, ours=lambda *t: Spoil.apply(problem.ours(*t)))
    assert gpu_smoke.compare(problem, CPU)[0] and not gpu_smoke.compare(wrong, CPU)[0]


def test_rows_that_nobody_wrote_are_seen(monkeypatch):
    """A kernel that hands on what memory held: ours runs in memory full of nan and plain in zeros, so it shows."""
    held = [0.0]
    monkeypatch.setattr(gpu_smoke, "fill_memory", lambda device, value: held.append(value))
    problem = Problem({"x": torch.ones(100)}, lambda x: x + held[-1], lambda x: x + held[-1], tolerance=0.0)
    assert gpu_smoke.compare(problem, CPU)[0]
    right, text = gpu_smoke.compare(dataclasses.replace(problem, fill=True), CPU)
    assert not right and "nan" in text and held[2:] == [0.0]


def test_a_case_that_raises_does_not_end_the_others(capsys, monkeypatch):
    def broken(device, size):
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    def good(device, size):
        return Problem({"x": torch.ones(3)}, torch.sin, torch.sin)

    cases = [Case("broken", broken), Case("good", good)]
    assert gpu_smoke.run(cases, CPU, "small", 0) == (["broken"], 2)
    out = capsys.readouterr().out
    assert "WRONG RuntimeError: CUDA error: an illegal memory access\n" in out and "good" in out
    monkeypatch.setattr(gpu_smoke, "device_is_lost", lambda device: True)
    assert gpu_smoke.run(cases, CPU, "small", 0) == (["broken"], 1)


def test_after_a_lost_device_a_new_process_goes_on(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_smoke, "run", lambda chosen, *_: ([chosen[2].name], 3))
    monkeypatch.setattr(gpu_smoke.subprocess, "call", lambda command: calls.append(command) or 0)
    monkeypatch.setattr("sys.argv", ["gpu_smoke.py", "--device", "cpu"])
    assert gpu_smoke.main() == 1
    assert calls[0][2:] == ["--device", "cpu", "--skip", "3", "--restarts", "3"]
    assert f"WRONG {smoke_cases.cases()[2].name}" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["gpu_smoke.py", "--device", "cpu", "--restarts", "0"])
    assert gpu_smoke.main() == 1 and len(calls) == 1


def test_plans_have_what_kernels_must_not_touch():
    rows = smoke_experts.rows_for_experts(200, 2, CPU)
    assert rows.vacant.any() and not rows.keep.all() and rows.keep.any()
    taken = rows.position[rows.keep]
    assert len(set(taken.tolist())) == len(taken) and not rows.vacant[taken].any()
    assert torch.equal(rows.pair[taken], torch.arange(400).view(200, 2)[rows.keep])

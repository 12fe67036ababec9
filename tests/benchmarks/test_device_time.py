"""What gpu_profile.py makes of a profile, and clocks, with a device that is a list of what happened."""

from types import SimpleNamespace

import device_clock
import gpu_profile
import pytest
import torch
import train_step
from gpu_profile import Span
from torch.autograd import DeviceType

from tests.training.recorder import HostRecorder


def event(name, start, end, *, device=DeviceType.CUDA, annotation=False):
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=times, device_type=device, is_user_annotation=annotation)


def test_only_what_ran_on_the_device_counts():
    events = [
        event("gemm", 0, 4),
        event("aten::mm", 0, 9, device=DeviceType.CPU),
        event("Optimizer.step", 0, 9, annotation=True),
    ]
    assert gpu_profile.spans_of(events) == [Span("gemm", 0, 4)]


def test_busy_is_the_union_over_streams():
    # 0 to 4 and 2 to 6 at a time, nothing until 8, 8 to 10; one within another.
    spans = [Span("a", 2, 6), Span("b", 0, 4), Span("a", 8, 10), Span("c", 8.5, 9)]
    assert gpu_profile.busy_share(spans) == pytest.approx(0.8)
    assert gpu_profile.busy_share([]) == 0.0
    assert gpu_profile.longest(spans, 2) == [("a", 6.0, 2), ("b", 4.0, 1)]


@pytest.fixture
def happened(monkeypatch):
    """Returns the list of what a device that takes six seconds between any two events was asked to do."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 6000.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: done.append("wait"))
    return done


def test_a_device_is_never_waited_for_between_calls(happened):
    found = device_clock.seconds_per_call(lambda: happened.append("call"), torch.device("cuda"), 3)
    assert found == 2.0 and happened == ["record", "call", "call", "call", "record", "wait"]
    happened.clear()
    assert train_step.timed(lambda: happened.append("call"), torch.device("cuda")) == pytest.approx(0.6)
    assert happened == ["record", *["call"] * 10, "record", "wait"]


def test_the_issue_of_a_step_begins_with_an_idle_device(happened):
    assert 0 <= gpu_profile.issue_milliseconds(lambda: happened.append("call"), torch.device("cuda")) < 1000
    assert happened == ["wait", "call"] * gpu_profile.ISSUED + ["wait"]


def small_side():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    return train_step.Side(model, torch.randn(3, 3, 2, 2), "fp32")


def test_a_step_from_a_graph_is_the_step(happened):
    ours, theirs, recorder = small_side(), small_side(), HostRecorder(torch.device("cpu"))
    step = gpu_profile.step_from_graph(ours, recorder)
    for _ in range(3):
        step()
        theirs.train()
    assert recorder.replayed == 3
    for found, expected in zip(ours.model.parameters(), theirs.model.parameters()):
        assert torch.equal(found, expected)


def test_what_a_graph_takes_is_printed(capsys, happened, monkeypatch):
    recorder = HostRecorder(torch.device("cpu"))
    gpu_profile.print_graphed(small_side(), recorder, torch.device("cuda"), 2)
    assert "from a CUDA graph: train 3000.00 ms a step (1 images/s), host issues it in" in capsys.readouterr().out

    def waits(call):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(recorder, "record", waits)
    gpu_profile.print_graphed(small_side(), recorder, torch.device("cuda"), 2)
    assert "from a CUDA graph: cannot be recorded (operation not permitted" in capsys.readouterr().out


def test_the_cpu_is_timed_per_call():
    calls = []
    assert device_clock.seconds_per_call(lambda: calls.append(sum(range(20_000))), torch.device("cpu"), 4) < 1
    assert len(calls) == 4


def test_a_profile_of_the_device_is_printed(monkeypatch, capsys, happened):
    events = [event("gemm", 0, 4000), event("gemm", 4000, 6000), event("Memcpy HtoD", 9000, 10_000)]

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return events

    monkeypatch.setattr(gpu_profile, "profile", Profile)
    gpu_profile.print_device(lambda: None, torch.device("cuda"), 2, 5)
    out = capsys.readouterr().out
    assert "1 kernels and 0 copies a step, device busy 70%, kernels together 3.50 ms a step" in out
    assert "3.000 ms  85.7%     1.0x  gemm" in out
    events.clear()
    gpu_profile.print_device(lambda: None, torch.device("cuda"), 2, 5)
    assert "saw nothing on the device" in capsys.readouterr().out

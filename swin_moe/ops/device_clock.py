"""How long a device takes for calls that it works off without waiting for the host."""

from collections.abc import Callable

import torch


def device_seconds(call: Callable[[], object], calls: int) -> float:
    """Returns the seconds of one of `calls` calls on the current CUDA device, between two events.

    Nobody waits in between: a wait after each would time the host.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls

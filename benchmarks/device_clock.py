"""How long a call takes: on a device between two events, on the CPU by the clock that suits the threads."""

import time
from collections.abc import Callable

import torch

from swin_moe.ops.device_clock import device_seconds


def seconds_per_call(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Returns the seconds of one of `calls` calls.

    A device works them off between two events; see device_seconds. On the CPU it is processor time of this
    process where it computes in one thread, which no other process adds to.
    """
    if device.type == "cuda":
        return device_seconds(call, calls)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(calls):
        call()
    return (clock() - begin) / calls

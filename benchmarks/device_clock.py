"""How long a call takes: on a device between two events, on the CPU by the clock that suits the threads."""

import time
from collections.abc import Callable

import torch


def seconds_per_call(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Returns the seconds of one of `calls` calls.

    A device works them off between two events and waits for nobody in between: a wait after each would time the host.
    On the CPU it is processor time of this process where it computes in one thread, which no other process adds to.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(calls):
        call()
    return (clock() - begin) / calls

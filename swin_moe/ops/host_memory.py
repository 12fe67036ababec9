"""Has the C library keep what a step frees, for the next step: on a CPU every step takes the same memory again.

glibc gives the end of its heap back to the system once 64 MiB of it are free, in the middle of a backward, and the next
step faults it in again page by page: 7,000 to 60,000 faults a step of Swin-T, by what else lies in the heap, each about
a microsecond. One thread of an AMD EPYC, forward and backward before and after: Swin micro (96 pixels, batch 16) 191
and 155 ms, SwinV2-T 580 and 548, Swin-T in bf16, recomputed 590 and 525, a small Swin-MoE in bf16 262 and 215; and the
same from step to step. A process holds what it held at its peak, which is 6 to 23 % higher
(benchmarks/results/2026-11-28-train-step.md): MALLOC_TRIM_THRESHOLD_=131072 leaves glibc as it is. Blocks of 32 MiB and
more are the system's as before.
"""

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt's options, malloc.h
_NEVER = -1
_LARGEST = 32 << 20  # bytes; glibc takes no larger one, and comes to it by itself after such a block was freed


@cache
def keep_freed_memory() -> bool:
    """Returns whether the heap keeps what is freed: not without glibc, nor where the user tells it what to keep."""
    told = "MALLOC_TRIM_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _NEVER))

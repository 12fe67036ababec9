"""The heap keeps what is freed: a process that takes the same memory again faults no page in."""

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, resource, sys
from swin_moe.ops.host_memory import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.free(libc.malloc(31 << 20))  # as in a process that has held large tensors
def taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(16)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
taken()
print(taken())
"""


def faults(*words, **variables):
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=True, env=variables or None
    )
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_what_is_freed_is_taken_again_without_faults():
    assert faults("keep") < 100 < 10_000 < faults()


def test_who_tells_the_allocator_what_to_keep_is_heard(monkeypatch):
    from swin_moe.ops import host_memory

    for name, value in (("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not host_memory.keep_freed_memory.__wrapped__()

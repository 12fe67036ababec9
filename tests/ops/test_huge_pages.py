"""The kernel's own account of a mapping says whether the advice arrived."""

import sys
from pathlib import Path

import pytest
import torch

from swin_moe.ops.huge_pages import on_huge_pages


def huge_kilobytes(address: int) -> int:
    """Returns AnonHugePages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            low, high = (int(part, 16) for part in words[0].split("-"))
            inside = low <= address < high
        elif inside and words[0] == "AnonHugePages:":
            return int(words[1])
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
def test_a_large_tensor_lies_on_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("transparent huge pages are off on this machine")
    tensor = on_huge_pages(torch.empty(64 << 20, dtype=torch.uint8)).fill_(1)
    assert huge_kilobytes(tensor.data_ptr() + (8 << 20)) >= 32 << 10
    assert bool((tensor == 1).all())


def test_small_and_foreign_tensors_are_left_alone():
    for tensor in (torch.empty(0), torch.empty(10), torch.empty(100, 5).t(), torch.empty(1 << 30, device="meta")):
        assert on_huge_pages(tensor) is tensor

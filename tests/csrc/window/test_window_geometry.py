"""csrc/window/window_geometry.h, which the CPU and the CUDA kernels share, against its Python twin."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from swin_moe.ops.attention.geometry import padded_size, partition_windows, relative_position_index, shift_mask

PROGRAM = Path(__file__).with_name("window_geometry_program.cpp")
CSRC = Path(__file__).resolve().parents[3] / "csrc"
CPU = torch.device("cpu")
PADDING = -1


def random_maps(count: int) -> list[tuple[int, int, int, int, int, int]]:
    """Returns (height, width, window, shift) of maps with and without padding, shift, and more than one window."""
    draw, maps = random.Random(0), [(7, 7, 7, 7, 0, 0), (1, 1, 1, 1, 0, 0), (1, 9, 1, 4, 0, 3), (8, 8, 4, 4, 2, 2)]
    while len(maps) < count:
        window = (draw.randint(1, 6), draw.randint(1, 6))
        size, shift = (draw.randint(1, 14), draw.randint(1, 14)), (draw.randrange(window[0]), draw.randrange(window[1]))
        maps.append((*size, *window, *shift))
    return maps


def expected(height: int, width: int, window_h: int, window_w: int, shift_h: int, shift_w: int) -> tuple:
    """Returns sources (M, N), masks (M, N, N) and bias rows (N, N) by rolling and cutting a map of token numbers."""
    window, full = (window_h, window_w), (padded_size(height, window_h), padded_size(width, window_w))
    numbers = torch.full(full, PADDING)
    numbers[:height, :width] = torch.arange(height * width).view(height, width)
    rolled = torch.roll(numbers, (-shift_h, -shift_w), dims=(0, 1))
    sources = partition_windows(rolled[None, :, :, None], window)[..., 0]
    mask = torch.zeros(len(sources), sources.shape[1], sources.shape[1])
    if shift_h or shift_w:
        mask = shift_mask(*full, window, (shift_h, shift_w), CPU, torch.float32)
    return sources, mask != 0, relative_position_index(window, CPU)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_header_equals_its_python_twin(tmp_path):
    program, maps = tmp_path / "program", random_maps(200)
    flags = ["-O1", "-std=c++17", "-Wall", "-Werror", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, "-o", program, PROGRAM], check=True)
    lines = "\n".join(" ".join(map(str, m)) for m in maps)
    printed = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == len(maps)
    for line, arguments in zip(printed, maps):
        found = torch.tensor([int(n) for n in line.split()])
        sources, masked, bias_rows = expected(*arguments)
        windows, tokens = sources.shape
        per_window = found[: windows * (2 * tokens + 1)].view(windows, 2 * tokens + 1)
        sides = per_window[:, tokens:-1]
        assert torch.equal(per_window[:, :tokens], sources), arguments
        assert torch.equal(sides[:, :, None] != sides[:, None, :], masked), arguments
        assert torch.equal(per_window[:, -1] == 1, masked.flatten(1).any(1)) or tokens == 1, arguments
        assert torch.equal(found[per_window.numel() :], bias_rows), arguments

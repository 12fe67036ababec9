"""Coordinates of position biases, and bias tables resized as the official loader does."""

import pytest
import torch

from swin_moe.models.attention import relative_coords_table, resize_bias_table
from tests.models.reference import NUMBERS

CPU = torch.device("cpu")


def test_log_spaced_coordinates():
    table = relative_coords_table(3, 3, CPU, torch.float32).view(5, 5, 2)
    assert table[2, 2].tolist() == [0.0, 0.0]
    assert table[4, 0].tolist() == pytest.approx([1.0566417, -1.0566417])  # log2(9) / 3
    assert table[3, 2].tolist() == pytest.approx([0.7739760, 0.0])  # log2(5) / 3
    # A window of 5 asks for the same values at the same offsets if the bias was trained with 3.
    torch.testing.assert_close(relative_coords_table(5, 3, CPU, torch.float32).view(9, 9, 2)[2:7, 2:7], table)
    assert relative_coords_table(1, 1, CPU, torch.float32).tolist() == [[0.0, 0.0]]


def test_bicubic_bias_table():
    golden = NUMBERS["rpb_bicubic_7to12"]
    table = torch.sin(0.1 * torch.arange(169.0)[:, None] + torch.arange(3.0)[None])
    resized = resize_bias_table(table, 12)
    assert resized.shape == (529, 3)
    for row in (0, 264, 528):
        assert resized[row].tolist() == pytest.approx(golden[f"R[{row}]"], abs=1e-5)
    assert resized.abs().sum().item() == pytest.approx(golden["abs_sum"], rel=1e-6)

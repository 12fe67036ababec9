"""Geometry of windows, and bias tables resized as the official loader does."""

import pytest
import torch

from swin_moe.models.attention import (
    merge_windows,
    partition_windows,
    relative_coords_table,
    relative_position_index,
    resize_bias_table,
    shift_mask,
)
from tests.models.reference import NUMBERS

CPU = torch.device("cpu")


def test_relative_positions_of_a_window_of_two():
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_position_index(2, CPU).view(4, 4).tolist() == expected


def test_windows_in_row_order():
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = partition_windows(x, 2)
    assert windows[1, :, 0].tolist() == [2, 3, 8, 9]
    assert windows.shape == (12, 4, 1)
    assert torch.equal(merge_windows(windows, 2, 4, 6), x)


def test_mask_of_a_shifted_map_of_two_by_two_windows():
    mask = shift_mask(4, 4, 2, 1, CPU, torch.float32)
    assert mask.shape == (4, 4, 4)
    assert not mask[0].any()
    across = [[0.0, -100.0, 0.0, -100.0], [-100.0, 0.0, -100.0, 0.0]]
    assert mask[1].tolist() == across * 2
    assert mask[3].tolist() == (torch.eye(4) * 100 - 100).tolist()


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

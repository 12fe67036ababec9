"""Geometry of windows: hand-checked numbers of small ones, square and not."""

import torch

from swin_moe.ops.attention.geometry import (
    gather_bias,
    merge_windows,
    padded_size,
    partition_windows,
    relative_position_index,
    shift_mask,
)

CPU = torch.device("cpu")


def test_relative_positions_of_a_window_of_two():
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_position_index((2, 2), CPU).view(4, 4).tolist() == expected


def test_windows_in_row_order():
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = partition_windows(x, (2, 2))
    assert windows[1, :, 0].tolist() == [2, 3, 8, 9]
    assert windows.shape == (12, 4, 1)
    assert torch.equal(merge_windows(windows, (2, 2), 2, 4, 6), x)


def test_mask_of_a_shifted_map_of_two_by_two_windows():
    mask = shift_mask(4, 4, (2, 2), (1, 1), CPU, torch.float32)
    assert mask.shape == (4, 4, 4)
    assert not mask[0].any()
    across = [[0.0, -100.0, 0.0, -100.0], [-100.0, 0.0, -100.0, 0.0]]
    assert mask[1].tolist() == across * 2
    assert mask[3].tolist() == (torch.eye(4) * 100 - 100).tolist()


def test_rectangular_windows_in_row_order():
    x = torch.arange(4 * 6).view(1, 4, 6, 1)
    windows = partition_windows(x, (2, 3))
    assert windows[1, :, 0].tolist() == [3, 4, 5, 9, 10, 11]
    assert torch.equal(merge_windows(windows, (2, 3), 1, 4, 6), x)


def test_relative_positions_of_a_rectangular_window():
    # Rows of the table: (dy + 0) * 5 + (dx + 2) for a window of 1 x 3.
    assert relative_position_index((1, 3), CPU).view(3, 3).tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    bias = gather_bias(torch.arange(10.0).view(5, 2), (1, 3))
    assert bias[1].tolist() == [[5.0, 3.0, 1.0], [7.0, 5.0, 3.0], [9.0, 7.0, 5.0]]


def test_mask_of_a_map_shifted_one_way():
    mask = shift_mask(2, 4, (2, 2), (0, 1), CPU, torch.float32, -7.0)
    assert not mask[0].any()
    assert mask[1].tolist() == [[0.0, -7.0, 0.0, -7.0], [-7.0, 0.0, -7.0, 0.0]] * 2


def test_padded_sizes():
    assert [padded_size(size, 7) for size in (1, 7, 8, 14)] == [7, 7, 14, 14]

"""Pieces of flat buffers are views of the right elements, and every rank names every tensor."""

import torch

from swin_moe.engine.deepspeed.flat import Fragment, flat_pieces
from swin_moe.layout import Chunk


def test_pieces_view_the_buffer_and_carry_global_offsets():
    buffer = torch.arange(10.0)
    layout = {"w": ((6, 3), Chunk((2, 0), (4, 3)))}  # this rank holds rows 2 to 5
    # elements 4 to 8 of those, the rest of row 3 and the first two of row 4, at 1 in the buffer
    pieces = flat_pieces("optim.exp_avg/w", "w", [Fragment("w", 4, 4, 0, 1)], [buffer], layout)
    assert [(p.name, p.shape, p.chunk) for p in pieces] == [
        ("optim.exp_avg/w", (6, 3), Chunk((3, 1), (1, 2))),
        ("optim.exp_avg/w", (6, 3), Chunk((4, 0), (1, 2))),
    ]
    assert [p.tensor.tolist() for p in pieces] == [[[1.0, 2.0]], [[3.0, 4.0]]]
    pieces[1].tensor.fill_(-1)
    assert buffer.tolist() == [0, 1, 2, -1, -1, 5, 6, 7, 8, 9]


def test_a_rank_without_elements_names_the_tensor():
    (piece,) = flat_pieces("w", "w", [], [torch.zeros(1)], {"w": ((2, 2), Chunk((0, 0), (2, 2)))})
    assert piece.name == "w" and piece.tensor.numel() == 0
    piece.check()

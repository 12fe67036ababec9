"""State that an engine keeps in flat buffers, parameters end to end and cut anywhere, as pieces of named tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swin_moe.checkpoint import Piece
from swin_moe.layout import Chunk, boxes_of_range


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a rank's part of a parameter, at `offset` of flat buffer number `buffer`."""

    name: str
    start: int
    numel: int
    buffer: int
    offset: int


def flat_pieces(
    saved: str,
    name: str,
    fragments: Iterable[Fragment],
    buffers: Sequence[Tensor],
    layout: Mapping[str, tuple[tuple[int, ...], Chunk]],
) -> list[Piece]:
    """Returns the pieces of one tensor, views of the flat buffers; an empty piece where this rank holds nothing of it.

    Every rank names every tensor, so that a checkpoint that holds more is noticed on all of them.

    Args:
        saved: Name in the checkpoint. name: The parameter's.
        layout: Parameter name -> (global shape, the box this rank holds), as parallel/apply.py:parameter_layout.
    """
    shape, held = layout[name]
    pieces = []
    for fragment in fragments:
        flat, position = buffers[fragment.buffer].detach().view(-1), fragment.offset
        for box in boxes_of_range(held.size, fragment.start, fragment.start + fragment.numel):
            offset = tuple(a + b for a, b in zip(held.offset, box.offset))
            view = flat[position : position + box.numel].view(box.size)
            pieces.append(Piece(saved, shape, flat.dtype, Chunk(offset, box.size), view))
            position += box.numel
    if not pieces:
        nothing = (0,) * len(shape)
        dtype = buffers[0].dtype if buffers else torch.float32
        pieces.append(Piece(saved, shape, dtype, Chunk(nothing, nothing), torch.empty(nothing, dtype=dtype)))
    return pieces

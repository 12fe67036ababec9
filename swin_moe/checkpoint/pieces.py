"""Pieces: boxes of named global tensors as engines hand them over, and their raw bytes. Imports no torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_moe.layout import Chunk

# safetensors dtype names and their bytes per element; all little-endian.
DTYPE_BYTES = dict(
    F64=8, F32=4, F16=2, BF16=2, F8_E4M3=1, F8_E5M2=1, I64=8, I32=4, I16=2, I8=1, U64=8, U32=4, U16=2, U8=1, BOOL=1
)
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
LIBRARY_NAMES = {  # of torch and numpy
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
# Bytes are moved as integers of the element's size, so no float is ever interpreted (bf16 and fp8 have no numpy type).
RAW: dict[int, np.dtype] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4"), 8: np.dtype("<i8")}
_EXPERTS = "experts"


def dtype_name(dtype: object) -> str:
    """Returns the safetensors name of a dtype given as that name, or as a torch or numpy dtype.

    Raises:
        ValueError: Checkpoints cannot hold this dtype.
    """
    text = str(dtype).removeprefix("torch.")
    if text in DTYPE_BYTES:
        return text
    if text not in LIBRARY_NAMES:
        raise ValueError(f"checkpoints hold no dtype {text}; allowed: {', '.join(DTYPE_BYTES)}")
    return LIBRARY_NAMES[text]


@dataclass(frozen=True, eq=False)
class Piece:
    """A box of a global tensor and the array that holds, or will receive, its elements."""

    name: str
    shape: tuple[int, ...]  # of the global tensor
    dtype: Any  # safetensors name, a str; a torch or numpy dtype is accepted and becomes one
    chunk: Chunk
    tensor: Any  # torch tensor or numpy array of shape chunk.size

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @classmethod
    def of(cls, name: str, tensor: Any, *, shape: tuple[int, ...] | None = None, chunk: Chunk | None = None) -> "Piece":
        """Returns the piece that holds `tensor`: a whole global tensor, or the box `chunk` of one of this shape."""
        shape = tuple(tensor.shape) if shape is None else tuple(shape)
        return cls(name, shape, tensor.dtype, Chunk.whole(shape) if chunk is None else chunk, tensor)

    def check(self) -> None:
        """Raises ValueError, naming the tensor, unless the box lies in the shape and the array fits the box."""
        offset, size, held = self.chunk.offset, self.chunk.size, tuple(self.tensor.shape)
        inside = len(offset) == len(size) == len(self.shape) and all(
            0 <= o and 0 <= n and o + n <= s for o, n, s in zip(offset, size, self.shape)
        )
        if not inside:
            raise ValueError(f"tensor {self.name}: box at {offset} of {size} lies outside its shape {self.shape}")
        if held != tuple(size):
            raise ValueError(f"tensor {self.name}: an array of shape {held} was given for a box of {size}")
        # numpy has no bf16 and no fp8: there only the element size can be compared.
        given = self.tensor.dtype
        fits = given.itemsize == DTYPE_BYTES[self.dtype]
        if not fits or str(given).startswith("torch.") and dtype_name(given) != self.dtype:
            raise ValueError(f"tensor {self.name}: an array of {given} was given for {self.dtype}")


def is_expert_tensor(name: str) -> bool:
    """True for parameters of experts and what follows them (moments, masters, averages): dim 0 counts experts."""
    return _EXPERTS in name.replace("/", ".").split(".")[:-1]


def place_text(name: str, chunk: Chunk) -> str:
    """Returns how errors call a stored chunk: its tensor, and the expert or the offset where it is not the whole."""
    if is_expert_tensor(name) and chunk.offset:
        return f"tensor {name}, expert {chunk.offset[0]}"
    return f"tensor {name}, chunk at {list(chunk.offset)}" if any(chunk.offset) else f"tensor {name}"


def array_to_raw(array: np.ndarray) -> np.ndarray:
    """Returns a numpy array as integers of its element size, sharing its memory."""
    return array.view(RAW[array.dtype.itemsize])

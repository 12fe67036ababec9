"""What every verb reads from: tensors by name, any box of them, whatever the format on disk. Imports no torch.

A format opens a Source that knows where each tensor's bytes lie. Verbs ask for boxes of at most
Options.box_bytes, in the order of `locate`, so that copying walks through each file once with bounded memory.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from swin_moe.checkpoint.communicator import Communicator, SingleProcess
from swin_moe.checkpoint.content import FILE_SIZE
from swin_moe.checkpoint.digest import BLOCK_BYTES, DEFAULT
from swin_moe.checkpoint.pieces import DTYPE_BYTES
from swin_moe.layout import Chunk

MAX_MEMORY = 512 << 20
MIN_MEMORY = 64 << 20
BOX_BYTES = 16 << 20  # larger ones are no faster, and readers hold replicas of one beside it


class SourceTensor(NamedTuple):
    """A global tensor: experts are numbered globally along dim 0."""

    shape: tuple[int, ...]
    dtype: str  # safetensors name

    @property
    def num_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return self.num_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Options:
    """What a verb was asked for, beside its paths. Formats use what concerns them."""

    max_memory: int = MAX_MEMORY  # resident bytes of the process beyond the interpreter and its modules
    file_size: int = FILE_SIZE  # target data bytes per native shard file
    algorithm: str = DEFAULT  # digest of native output
    verify: bool = True  # compare what is read with its digests, where the format has them
    on_drift: str = "error"  # replicas that differ: "error", "first" or "mean"
    world: int = 0  # rank files to write; 0 = as many as the format needs
    extra: Mapping[str, str] = field(default_factory=dict)  # --set KEY=VALUE, for single formats
    comm: Communicator = field(default_factory=SingleProcess)
    report: Callable[[str], None] = print  # sentences for the user; called on any rank
    progress: Callable[[int], None] = lambda num_bytes: None  # bytes just written

    def __post_init__(self) -> None:
        for name in ("max_memory", "file_size", "world"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"--{name.replace('_', '-')} must be a whole number, got {value!r}")
        if not isinstance(self.extra, Mapping):
            raise ValueError(f"--set must be a mapping of texts (Options.extra), got {self.extra!r}")
        if self.max_memory < MIN_MEMORY:
            raise ValueError(f"--max-memory must be at least {MIN_MEMORY >> 20} MiB, got {self.max_memory} bytes")
        if self.on_drift not in ("error", "first", "mean"):
            raise ValueError(f"--on-drift must be error, first or mean, got {self.on_drift!r}")
        if self.world < 0:
            raise ValueError(f"--world must be >= 0 ranks, got {self.world}")

    @property
    def box_bytes(self) -> int:
        """Bytes of the largest box read at once, whole blocks; a reader's own buffers may take 8 times as much."""
        return max(BLOCK_BYTES, min(BOX_BYTES, self.max_memory // 32) // BLOCK_BYTES * BLOCK_BYTES)


class Source(Protocol):
    """A checkpoint to read. Construct it with the headers read and checked, and no tensor data.

    What derives from it sets the attributes and defines `read`; `locate`, `read_bytes` and `identity` where the
    defaults are not good enough. What does not derive has all members: open_source checks them. Errors are
    CheckpointError or CorruptionError (swin_moe.checkpoint.errors) of one sentence that names the file and the tensor,
    with its expert. `read` is called from one thread.
    """

    format: str  # its row in FORMATS
    path: Path  # as the user gave it
    files: list[Path]  # every file that holds something of it
    tensors: dict[str, SourceTensor]  # under our names: parameters, optim.<state>/, ... (docs/checkpoint_format.md)
    has_digests: bool = False  # whether `read` would notice a flipped bit
    step: int = 0  # optimizer steps done
    step_unknown: bool = False  # there is optimizer state, but nothing tells after how many steps
    state: dict[str, Any]  # JSON as train.py saves it, or {} where the format holds none of it
    config: dict[str, Any]  # JSON, our option names, without entries of layout and host; {} where unknown
    provenance: dict[str, Any]  # JSON for people: where it came from; no part of the output's identity

    @property
    def described(self) -> str:
        """Returns where it comes from, for people."""
        return f"{self.path} ({self.format})"

    def read(self, name: str, box: Chunk, destination: np.ndarray) -> None:
        """Fills `destination`, raw integers (pieces.RAW) of shape box.size and any strides, with a box of a tensor.

        Never holds the whole tensor: its own buffers stay below 8 * Options.box_bytes.

        Raises:
            CheckpointError: Replicas differ and Options.on_drift is "error"; names the tensor and max |delta|.
            CorruptionError: The bytes cannot be read, or do not match their digest.
        """
        ...

    def locate(self, name: str, box: Chunk) -> tuple[str, int]:
        """Returns (file, offset) where reading a box begins: boxes read in this order stream each file once."""
        return "", 0

    def read_bytes(self, name: str, box: Chunk) -> int:
        """Returns the bytes that reading this box takes from files; more than it holds where replicas are compared."""
        return box.numel * DTYPE_BYTES[self.tensors[name].dtype]

    def identity(self) -> Any:
        """Returns JSON that differs once a file of the source was changed; another one's journal is not continued."""
        stats = ((str(path), os.stat(path)) for path in self.files)
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in sorted(stats, key=lambda item: item[0])]

    def num_chunks(self, name: str) -> int:
        """Returns in how many parts a tensor is stored."""
        return 1

    def find_problems(self) -> list[str]:
        """Returns a sentence for each thing that is wrong outside the tensors' data."""
        return []

    def find_wrong_data(self, options: Options, advance: Callable[[int], None]) -> list[str] | None:
        """Returns a sentence for each part of this rank's share of the data that is wrong, after reading all of it.

        None where the format knows no quicker way than to read every box.
        """
        return None

    def close(self) -> None:
        """Closes files."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def split_kind(name: str) -> tuple[str, str]:
    """Returns (what it is, whose): ("exp_avg", "head.bias") of "optim.exp_avg/head.bias"; a parameter is "weight"."""
    kind, slash, parameter = name.partition("/")
    return (kind.removeprefix("optim."), parameter) if slash else ("weight", name)

"""Files that hold one state dict: read from torch.save or safetensors files, written to either by the path's ending."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint_tools.publish import publish_files
from checkpoint_tools.record_file import OpenFiles, TensorRecord, contiguous_boxes
from checkpoint_tools.safetensors_file import SafetensorsFile
from checkpoint_tools.source import Options
from checkpoint_tools.torch_file import TorchFile
from checkpoint_tools.torch_writer import NewTensor, num_bytes, write_torch
from swin_moe.checkpoint.errors import CheckpointError, CorruptionError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.checkpoint.plan import encode_header

# Under which key training loops keep the weights, and what wrappers of modules put before names.
_WRAPPERS = ("model", "state_dict", "module", "model_state", "model_state_dict", "net", "network", "weights")
_PREFIXES = ("module.", "backbone.", "model.", "net.", "network.")
_INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # anywhere in a name
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel
# The tensor that every network of ours has, here and in transformers: what stands before its name is a prefix.
_FIRST = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
_OWN_PREFIXES = ("", "encoder.", "encoder_k.", "swin.", "swinv2.")  # which the rules of formats take off


class Weights(NamedTuple):
    """The tensors of a file by name, and what was taken off to find them."""

    records: dict[str, TensorRecord]
    wrapper: str = ""  # key of the content
    taken: tuple[str, ...] = ()  # prefixes

    @property
    def note(self) -> str:
        """What a user should know of it; "" where the file is as the official code writes it."""
        parts = [f"the key {self.wrapper!r}"] if self.wrapper not in ("", "model") else []
        return " and ".join([*parts, *(f"the prefix {prefix!r}" for prefix in self.taken)])


def open_file(path: Path, files: OpenFiles | None = None) -> TorchFile | SafetensorsFile:
    """Returns the opened file; its `content` has TensorRecords for tensors. What it holds decides, not its name.

    Raises:
        CheckpointError: It is neither a file of torch.save nor a safetensors file, or is refused.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'does not exist'}")
    if not path.stat().st_size:
        raise CorruptionError(f"{path}: is empty")
    return SafetensorsFile(path, files) if is_safetensors(path) else TorchFile(path, files)


def is_safetensors(path: Path) -> bool:
    """Returns whether a file begins as a safetensors file does."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        head = stream.read(9)
    named = path.suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02")
    return named or head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def state_dict(content: Any, path: Path) -> dict[str, TensorRecord]:
    """Returns the tensors of a file by name; see find_weights."""
    return find_weights(content, path).records


def find_weights(content: Any, path: Path) -> Weights:
    """Returns the tensors of a file: the file itself, or what a training loop wrapped in "model", "state_dict", ...

    Known prefixes of wrapped modules are taken off.

    Raises:
        CheckpointError: It holds something else; names it.
    """
    wrapped, wrapper = content, ""
    if isinstance(content, dict):
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), "")
        wrapped = content[wrapper] if wrapper else content
    if not isinstance(wrapped, dict) or not wrapped:
        raise CheckpointError(f"{path}: holds no state dict")
    found = {}
    for name, value in wrapped.items():
        # Tutel's gather stores the number of experts as a plain number.
        if isinstance(value, TensorRecord):
            found[str(name)] = value
        elif not (isinstance(value, int) and str(name).endswith("_num_global_experts")):
            raise CheckpointError(f"{path}: {_strange(wrapped, str(name)[:100], value)}")
    return _unwrapped(found, wrapper, path)


def _strange(content: dict, name: str, value: Any) -> str:
    """Returns why a dict with this entry is no state dict."""
    inner = next((k for k, v in content.items() if isinstance(v, dict) and _holds_tensors(v)), None)
    if inner is None:
        return f"{name!r} is a {type(value).__name__}, not a tensor"
    return f"holds tensors under the key {str(inner)[:100]!r}; known are {', '.join(_WRAPPERS)}"


def _holds_tensors(content: dict) -> bool:
    return any(isinstance(value, TensorRecord) for value in content.values())


def _unwrapped(found: dict[str, TensorRecord], wrapper: str, path: Path) -> Weights:
    """Returns the weights under their names without known prefixes."""
    taken = [prefix for prefix in _INNER if any(prefix in name for name in found)]
    plain = {name: name for name in found if name not in _COUNTERS}
    for prefix in taken:
        plain = {name: short.replace(prefix, "") for name, short in plain.items()}
    start, rest = "", first_prefix(plain.values()) or ""
    while prefix := next((p for p in _PREFIXES if rest.startswith(p)), ""):
        start, rest = start + prefix, rest.removeprefix(prefix)
    if start:
        taken.append(start)
    records: dict[str, TensorRecord] = {}
    for name, short in plain.items():
        short = short.removeprefix(start)
        if short in records:
            raise CheckpointError(f"{path}: two tensors stand for {short}, one of them {name[:100]}")
        records[short] = found[name]
    return Weights(records, wrapper, tuple(taken))


def first_prefix(names: Iterable[str]) -> str | None:
    """Returns what stands before the names of a Swin network's tensors; None where it has none of them."""
    starts = (name.removesuffix(first) for name in names for first in _FIRST if name.endswith(first))
    return min(starts, key=len, default=None)


def peek(path: Path) -> frozenset[str]:
    """Returns the names of the tensors of a file, to recognize its format; nothing if it cannot be read."""
    try:
        return _peek(path, path.stat().st_mtime_ns)[0] if path.is_file() else frozenset()
    except (CheckpointError, OSError):
        return frozenset()


def taken_off(path: Path) -> str:
    """Returns what was taken off the content and the names of a file, as text; "" where nothing was."""
    try:
        return _peek(path, path.stat().st_mtime_ns)[1] if path.is_file() else ""
    except (CheckpointError, OSError):
        return ""


@functools.lru_cache(maxsize=4)
def _peek(path: Path, modified: int) -> tuple[frozenset[str], str]:
    file = open_file(path)
    file.files.close()
    weights = find_weights(file.content, path)
    return frozenset(weights.records), weights.note


def why_unknown(path: Path) -> str:
    """Returns why a file is of no known format.

    Raises:
        CheckpointError: It cannot be read at all, which says more.
    """
    file = open_file(path)
    file.files.close()
    names = sorted(find_weights(file.content, path).records)
    start = first_prefix(names)
    if start not in (None, *_OWN_PREFIXES):
        return f"its tensors have the prefix {start!r}; known are {', '.join((*_PREFIXES, *_INNER))}"
    shown = ", ".join(name[:60] for name in names[:3])
    return f"its {len(names)} tensors ({shown}, ...) are no Swin network's" if names else "it holds no tensors"


def write_state_dict(path: Path, tensors: Mapping[str, NewTensor], options: Options) -> None:
    """Writes one state dict at `path`; rank 0 writes, every rank calls it."""
    safe = path.suffix == ".safetensors"

    def write(staging: Path) -> None:
        if options.comm.rank == 0 and safe:
            stream_safetensors(staging / path.name, tensors, options)
        elif options.comm.rank == 0:
            write_torch(staging / path.name, dict(tensors), box_bytes=options.box_bytes, progress=options.progress)

    publish_files(path, num_bytes(dict(tensors)), write, comm=options.comm)


def stream_safetensors(path: Path, tensors: Mapping[str, NewTensor], options: Options) -> None:
    """Writes a safetensors file box by box; wider elements first, as the format aligns them."""
    names = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))
    end, entries = 0, {}
    for name in names:
        start, end = end, end + tensors[name].num_bytes
        entries[name] = {
            "dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end],
        }  # fmt: skip
    with open(path, "wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for name in names:
            item = DTYPE_BYTES[tensors[name].dtype]
            for box in contiguous_boxes(tensors[name].shape, options.box_bytes // item):
                data = np.empty(box.size, RAW[item])
                tensors[name].fill(box, data)
                file.write(memoryview(data.reshape(-1).view(np.uint8)))
                options.progress(data.nbytes)


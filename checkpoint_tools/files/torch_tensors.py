"""Tensors in pickles of torch.save: which storages and dtypes there are, and where a tensor's elements lie."""

import math
from typing import Any

from checkpoint_tools.files.pickle_reader import BUILDERS, Global
from checkpoint_tools.files.record_file import Storage, TensorRecord
from swin_moe.checkpoint.index import MAX_DIMS
from swin_moe.checkpoint.pieces import LIBRARY_NAMES

MAX_COUNT = 1 << 62
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
DTYPES = LIBRARY_NAMES | {"double": "F64", "float": "F32", "half": "F16", "long": "I64", "int": "I32", "short": "I16"}


def named_records(content: Any) -> list[tuple[str, TensorRecord]]:
    """Returns every tensor in nested dicts and lists with its path; each container is visited once."""
    found, seen, waiting = [], set(), [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, TensorRecord):
            found.append((name, value))
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else str(key), inner) for key, inner in items]
        elif hasattr(value, "state") and id(value) not in seen:
            seen.add(id(value))
            waiting += [(name, value.state), (name, value.args)]
    return found


def storage_of(reference: Any) -> Storage:
    """Returns the storage that a persistent id of torch.save names; raises ValueError for any other."""
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise ValueError("a reference to something that is no storage")
    _, kind, key, _, numel = reference[:5]
    name = kind.name if isinstance(kind, Global) else ""
    if name not in STORAGES or not isinstance(key, str) or not _counts((numel,)):
        raise ValueError(f"a storage of kind {kind}")
    if len(reference) > 5 and reference[5] is not None:
        raise ValueError("a storage that is a view of another one")
    return Storage(key, STORAGES[name], numel)


def tensor_builders() -> dict[str, Any]:
    """Returns the builders of pickles that hold tensors."""
    storages = {f"{module}.{name}": _no_call for name in STORAGES for module in ("torch", "torch.storage")}
    return {
        **BUILDERS,
        **storages,
        **{f"torch.{name}": _no_call for name in DTYPES},
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch.Tensor": _no_call,
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch.Size": lambda sizes=(): tuple(sizes) if _counts(sizes) else _no_call(),
        "torch.device": lambda *where: ":".join(map(str, where)),
    }


def _no_call(*_: Any) -> Any:
    raise ValueError("a call of something that only names a kind of data")


def _counts(values: Any) -> bool:
    return isinstance(values, tuple | list) and all(type(n) is int and 0 <= n <= MAX_COUNT for n in values)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRecord:
    """Builds what torch._utils._rebuild_tensor_v2 builds; also called for parameters and older files."""
    dtype = storage.dtype if isinstance(storage, Storage) else ""
    return _record(storage, offset, shape, stride, dtype)


def _from_type(rebuild: Any, kind: Any, arguments: Any, *_: Any) -> TensorRecord:
    """Builds a tensor that had attributes of its own when it was saved; they are left out."""
    plain = rebuild == Global("torch._utils", "_rebuild_tensor_v2") and kind == Global("torch", "Tensor")
    return _tensor(*arguments) if plain and isinstance(arguments, tuple) else _no_call()


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    return _record(storage, offset, shape, stride, DTYPES.get(getattr(dtype, "name", ""), ""))


def _record(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str) -> TensorRecord:
    good = isinstance(storage, Storage) and dtype and _counts(shape) and _counts(stride) and _counts((offset,))
    if not good or len(shape) != len(stride) or len(shape) > MAX_DIMS:
        raise ValueError("a tensor with an impossible shape, stride or storage")
    if math.prod(shape) > MAX_COUNT:
        raise ValueError(f"a tensor of shape {tuple(shape)}, which is impossible")
    return TensorRecord(storage, offset, tuple(shape), tuple(stride), dtype)


def _parameter(tensor: Any, *_: Any) -> TensorRecord:
    return tensor if isinstance(tensor, TensorRecord) else _no_call()

"""What training loops put around a network's tensors, and before their names: found, taken off and told. No torch.

Shared by the networks, which get state dicts in memory, and by checkpoint_tools, which read files.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from swin_moe.names.official import DENSE, DENSE_PARTS

T = TypeVar("T")

# Under which key training loops keep the weights; averaged ones are taken where there are no others.
AVERAGES = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
WRAPPERS = [*"model state_dict module model_state model_state_dict net network weights".split(), *AVERAGES]
PREFIXES = ("module.", "backbone.", "model.", "net.", "network.")
INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # anywhere in a name
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel
# The tensor that every network of ours has, here, in open-mmlab's port and in transformers: what stands before its name
# is a prefix.
_FIRST = (
    "patch_embed.proj.weight",
    "patch_embed.projection.weight",
    "embeddings.patch_embeddings.projection.weight",
)
_OWN_PREFIXES = ("", "encoder.", "encoder_k.", "backbone.", "swin.", "swinv2.")  # which the rules of formats take off
_DEPTH = 3  # wrappers around wrappers


class Weights(NamedTuple, Generic[T]):
    """The tensors of a state dict by name, and what was taken off to find them."""

    records: dict[str, T]
    wrapper: str = ""  # key of the content, "outer.inner" of one in another
    taken: tuple[str, ...] = ()  # prefixes
    averages: str = ""  # key of averaged weights that stand beside these
    averaged: Mapping[str, T] = MappingProxyType({})  # those, by the same names; {} if they are not of this network

    @property
    def note(self) -> str:
        """How it was read, as a user should know: "without the key 'net'"; "" where it is as the official code writes
        it."""
        parts = [f"the key {self.wrapper!r}"] if self.wrapper not in ("", "model") else []
        parts += [f"the prefix {prefix!r}" for prefix in self.taken]
        averages = f"the averages under {self.averages!r}"
        parts += [averages] if self.averages and not self.averaged else []
        without = [f"without {' and '.join(parts)}"] if parts else []
        return ", ".join([*without, *([f"with {averages}"] if self.averaged else [])])

    @property
    def stored(self) -> dict[str, T]:
        """The tensors under the names that ours are stored by: averages are `ema/<name>`."""
        return self.records | {f"ema/{name}": value for name, value in self.averaged.items()}


def find_weights(content: Any, is_tensor: Callable[[Any], bool]) -> Weights:
    """Returns the tensors of a state dict: the content itself, or what a training loop wrapped in "model", ...

    Known prefixes of wrapped modules are taken off. Averages beside the weights are found where they are averages of
    some of these: by name and shape.

    Args:
        is_tensor: Whether a value is a tensor, or what stands for one.

    Raises:
        ValueError: It holds something else; a clause that names it.
    """
    found, averages, beside = _open(content, is_tensor)
    if not averages:
        return found
    try:
        averaged = _open(beside, is_tensor)[0].records
    except ValueError:
        averaged = {}
    fits = all(
        name in found.records and _shape(value) == _shape(found.records[name]) for name, value in averaged.items()
    )
    return found._replace(averages=averages, averaged=averaged if fits else {})


def _open(content: Any, is_tensor: Callable[[Any], bool]) -> tuple[Weights, str, Any]:
    """Returns (the weights, the key of averages beside them or "", what stands under it)."""
    keys: list[str] = []
    averages, inner, beside = "", content, None
    while isinstance(inner, Mapping) and len(keys) < _DEPTH and not _holds(inner, is_tensor):
        inside = [key for key in WRAPPERS if isinstance(inner.get(key), Mapping)]
        key = next((key for key in inside if _holds(inner[key], is_tensor, deep=True)), next(iter(inside), None))
        if key is None:
            break
        averages = next((other for other in inside if other in AVERAGES and key not in AVERAGES), averages)
        beside = inner.get(averages, beside)
        keys.append(key)
        inner = inner[key]
    if not isinstance(inner, Mapping) or not inner:
        raise ValueError("holds no state dict")
    found = {}
    for name, value in inner.items():
        # Tutel's gather stores the number of experts as a plain number.
        if is_tensor(value) or (isinstance(value, int) and str(name).endswith("_num_global_experts")):
            found[str(name)] = value
        else:
            raise ValueError(_strange(inner, str(name)[:100], value, is_tensor))
    return _unwrapped(found, ".".join(keys)), averages, beside


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if hasattr(value, "shape") else None


def _holds(content: Mapping, is_tensor: Callable[[Any], bool], *, deep: bool = False) -> bool:
    """Returns whether any value is a tensor; `deep`: or a mapping that holds one."""
    values = content.values()
    return any(is_tensor(v) or (deep and isinstance(v, Mapping) and _holds(v, is_tensor)) for v in values)


def _strange(content: Mapping, name: str, value: Any, is_tensor: Callable[[Any], bool]) -> str:
    """Returns why a mapping with this entry is no state dict."""
    inner = next((k for k, v in content.items() if isinstance(v, Mapping) and _holds(v, is_tensor)), None)
    if inner is None and name in WRAPPERS:
        return f"{name} is {type(value).__name__}, not a state dict"
    if inner is None:
        return f"{name!r} is a {type(value).__name__}, not a tensor"
    return f"holds tensors under the key {str(inner)[:100]!r}; known are {', '.join(WRAPPERS)}"


def _unwrapped(found: dict[str, T], wrapper: str) -> Weights[T]:
    """Returns the weights under their names without known prefixes; raises ValueError where two become one."""
    taken = [prefix for prefix in INNER if any(prefix in name for name in found)]
    plain = {name: name for name in found if name not in _COUNTERS}
    for prefix in taken:
        plain = {name: short.replace(prefix, "") for name, short in plain.items()}
    start, rest = "", first_prefix(plain.values()) or ""
    while prefix := next((p for p in PREFIXES if rest.startswith(p)), ""):
        if prefix == DENSE and any(name.startswith(tuple(start + p for p in DENSE_PARTS)) for name in plain.values()):
            break  # the backbone of a detector or segmentor, whose heads stand beside it
        start, rest = start + prefix, rest.removeprefix(prefix)
    if start:
        taken.append(start)
    records: dict[str, T] = {}
    for name, short in plain.items():
        short = short.removeprefix(start)
        if short in records:
            raise ValueError(f"two tensors stand for {short}, one of them {name[:100]}")
        records[short] = found[name]
    return Weights(records, wrapper, tuple(taken))


def first_prefix(names: Iterable[str]) -> str | None:
    """Returns what stands before the names of a Swin network's tensors; None where it has none of them."""
    starts = (name.removesuffix(first) for name in names for first in _FIRST if name.endswith(first))
    return min(starts, key=len, default=None)


def unknown_prefix(names: Iterable[str]) -> str:
    """Returns a clause about a prefix that no rule takes off; "" where there is none."""
    start = first_prefix(names)
    if start in (None, *_OWN_PREFIXES):
        return ""
    return f"its tensors have the prefix {start!r}; known are {', '.join((*PREFIXES, *INNER))}"

"""Values of options as files and words hold them, as the types of the schema's fields; and keys that are none."""

import contextlib
import dataclasses
import difflib
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from swin_moe.config.checks import describe_kind, field_types, is_open, shown
from swin_moe.config.official import our_key
from swin_moe.config.schema import Config
from swin_moe.config.synonyms import meant
from swin_moe.config.tasks import TaskOptions
from swin_moe.config.yaml_files import ConfigLoader

_PATHS = (
    "data.path",
    "run.output",
    "checkpoint.load",
    "checkpoint.init",
    "task.distill.teacher",
    "model.moe.tune_cache",
)
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


class Word(str):
    """What followed `key=`, of an option whose type is not known yet."""


def read_word(text: str, kind: Any) -> Any:
    """Returns the value of a `key=text` word: YAML, but the text as it is for a field of texts."""
    try:
        value = yaml.load(text, ConfigLoader)
    except yaml.YAMLError:
        value = text
    return text.strip() if kind is str and not isinstance(value, str) else value


def coerce_tree(tree: dict, schema: Any = Config, *, source: str = "", prefix: str = "") -> dict:
    """Returns the tree with every value in its field's type, but for what stands under task.own (see own_tree).

    Raises:
        ValueError: With source, where one is given, key, value and type.
    """
    out: dict = {}
    told = f"{source}: " if source else ""
    for key, value in tree.items():
        full = f"{prefix}{key}"
        kind = _type_of(str(key), schema, prefix, told)
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"{told}{full} is a section of keys, got {shown(value)}")
            later = kind is TaskOptions
            out[key] = value if later else coerce_tree(value, kind, source=source, prefix=f"{full}.")
        else:
            try:
                value = read_word(value, kind) if isinstance(value, Word) else value
                out[key] = value if is_open(full, value) else _coerce(value, kind)
                if full in _PATHS and out[key].startswith("~"):  # a shell does not expand it after key=
                    out[key] = str(Path(out[key]).expanduser())
            except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several numbers
                allowed = describe_kind(kind, written=True)
                raise ValueError(f"{told}{full} must be {allowed}, got {shown(value)}") from None
    return out


def _coerce(value: Any, kind: Any) -> Any:
    """Returns `value` as `kind`, a field type of schema.py; raises TypeError or ValueError where it is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, bool) or value not in arguments:
            raise ValueError(value)
        return value
    if origin in (types.UnionType, Union):
        return _coerce_one_of(value, arguments)
    if origin is tuple:
        return _coerce_tuple(value, arguments)
    if kind is bool:
        word = str(value).lower()
        if word not in _TRUE + _FALSE:
            raise TypeError(value)
        return word in _TRUE
    if kind is str:
        if not isinstance(value, str):
            raise TypeError(value)
        return value
    if isinstance(value, bool) or value is None:
        raise TypeError(value)
    number = float(value)
    if not math.isfinite(number) or kind is int and number != int(number):
        raise ValueError(value)
    if kind is int:
        return value if isinstance(value, int) else int(number)
    return number


def _coerce_one_of(value: Any, kinds: tuple) -> Any:
    """Returns `value` as the first of several types that takes it."""
    if value is None and types.NoneType in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in others:
        with contextlib.suppress(TypeError, ValueError):
            return _coerce(value, kind)
    return _coerce(value, last)


def _coerce_tuple(value: Any, arguments: tuple) -> tuple:
    """Returns a list as a tuple; one number stands for a square or a tuple of one."""
    open_ended = len(arguments) == 2 and arguments[1] is Ellipsis
    if not isinstance(value, (list, tuple)):
        if get_origin(arguments[0]) is tuple or value is None or isinstance(value, dict):
            raise TypeError(value)
        value = [value] * (1 if open_ended else len(arguments))
    if not open_ended and len(value) != len(arguments):
        raise ValueError(value)
    kinds = arguments[:1] * len(value) if open_ended else arguments
    if any(get_origin(kind) is tuple and not isinstance(item, (list, tuple)) for item, kind in zip(value, kinds)):
        raise TypeError(value)
    return tuple(map(_coerce, value, kinds))


def type_of(key: str, *, source: str) -> Any:
    """Returns the type of a dotted key, Word of one under task.own; raises ValueError with near keys for no key."""
    return Word if key.startswith("task.own.") else _type_of(key, Config, "", f"{source}: ")


def _type_of(key: str, schema: Any, prefix: str, told: str) -> Any:
    """Returns the type of a key, dotted from `schema` on, whose own key is `prefix`."""
    kind: Any = schema
    for part in key.split("."):
        types_of = field_types(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in types_of:
            near = [*schema_keys(Config), *(schema_keys(schema, prefix) if prefix else ())]
            raise ValueError(f"{told}unknown key {shown(prefix + key)}{_hint(prefix + key, near)}")
        kind = types_of[part]
    return kind


def _hint(key: str, keys: list[str]) -> str:
    """Returns "; did you mean ...?": near spellings, the same last word elsewhere, or our name of an official key."""
    if told := our_key(key):
        return told
    leaf = key.rpartition(".")[2]
    if not any(k.rpartition(".")[2] == leaf for k in keys) and (told := meant(key)):
        return f"; {told}"
    initials = "".join(word[:1] for word in leaf.split("_"))  # learning_rate is lr
    near = [k for k in keys if k.rpartition(".")[2] in (leaf, initials)]
    near += difflib.get_close_matches(key, keys, n=3, cutoff=0.9)
    words = {word for word in leaf.split("_") if len(word) > 2}
    section = key.rpartition(".")[0]
    near += [k for k in keys if k.rpartition(".")[0] == section and words & set(k.rpartition(".")[2].split("_"))]
    near = list(dict.fromkeys(near + difflib.get_close_matches(key, keys, n=3)))
    if not near:
        leaves = {k.rpartition(".")[2]: k for k in keys}
        near = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=2)]
    return f"; did you mean {', '.join(near[:3])}?" if near else f"; sections: {', '.join(field_types(Config))}"


def schema_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of the schema, sections included."""
    for name, kind in field_types(schema).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            yield from schema_keys(kind, f"{prefix}{name}.")

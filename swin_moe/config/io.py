"""Configs from YAML files with `base:` inheritance and `key=value` overrides, and back to YAML.

A file whose top-level keys are the sections of the official repository (DATA, MODEL, TRAIN, ...) is read through
official.py, unchanged. The schema, with units and ranges, is schema.py.
"""

import dataclasses
import difflib
import logging
import math
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from swin_moe.config.checks import describe_kind, is_open, shown
from swin_moe.config.official import convert_official, is_official, our_key
from swin_moe.config.official_options import refusal
from swin_moe.config.schema import Config
from swin_moe.config.yaml_files import ConfigLoader, read_yaml

logger = logging.getLogger(__name__)

_PATHS = ("data.path", "run.output", "checkpoint.load", "checkpoint.init", "task.teacher", "model.moe.tune_cache")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


def load_config(path_or_name: str | Path, overrides: Iterable[str] = (), *, world_size: int | None = None) -> Config:
    """Returns the checked config of a file, its bases and `key=value` overrides, in rising precedence.

    `run.name` defaults to the file's name without .yaml. How gaps of an official file were filled is logged.

    Args:
        path_or_name: A YAML file, or a name that `find_config` knows.
        overrides: "section.key=value", values in YAML; a str field takes its text as it is.
        world_size: Ranks an official file was written for, if its name (`..._32gpu_...`) does not tell: experts =
            NUM_LOCAL_EXPERTS x ranks, global batch = BATCH_SIZE x ranks. None = the published recipe's batch.

    Raises:
        ValueError: With file, key and what is allowed.
    """
    path = _resolve(path_or_name)
    given = _parse_overrides(overrides)
    notes: list[str] = []
    own = _read_tree(path, (), _Context(world_size, frozenset(_flatten(given)), notes))
    own.setdefault("run", {}).setdefault("name", path.stem)
    try:
        config = _build(Config, merge(own, given))
    except ValueError as error:
        raise ValueError(f"{_culprit(path, own, given, str(error))}: {error}") from None
    for note in notes:
        logger.info("%s: %s", path.name, note)
    return config


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Returns the config with `section.key=value` overrides applied and checked; raises ValueError as load_config."""
    _check_config(config)
    return _build(Config, merge(_tree_of(config), _parse_overrides(overrides)))


def config_from_tree(tree: dict, *, source: str) -> Config:
    """Returns the checked config of nested JSON, such as a checkpoint holds; what it leaves out has its default.

    Args:
        source: What the tree came from, for errors.

    Raises:
        ValueError: With source, key and what is allowed.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"{source}: a config is a tree of sections such as 'model', got {shown(tree)}")
    try:
        return _build(Config, _coerce_tree(tree, Config, source=source))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None


def typed_tree(tree: dict, *, source: str) -> dict:
    """Returns nested values of options in their fields' types; raises ValueError with source, key and what is allowed.

    Args:
        source: What the tree came from, for errors.
    """
    return _coerce_tree(tree, Config, source=source)


def dump_config(config: Config, path: str | Path) -> None:
    """Writes every option as YAML that load_config reads back equal."""
    _check_config(config)
    _check_name(path)
    text = yaml.safe_dump(_listed(dataclasses.asdict(config)), sort_keys=False, default_flow_style=None, width=120)
    Path(path).write_text(text, encoding="utf-8")


def find_config(name: str) -> Path:
    """Returns the file of a config by its name without .yaml, in any subfolder of the installed or checked-out configs.

    Raises:
        ValueError: No file of that name (with near names), or more than one.
    """
    _check_name(name)
    folder = config_folder()
    wanted = Path(name.removesuffix(".yaml"))
    files = sorted(folder.rglob("*.yaml"))
    found = [f for f in files if f.with_suffix("").parts[-len(wanted.parts) :] == wanted.parts]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"config {name!r} is ambiguous: {', '.join(str(f.relative_to(folder)) for f in found)}")
    near = difflib.get_close_matches(wanted.name, [f.stem for f in files], n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"no config file or config name {shown(name)} (looked in {folder}){hint}")


def merge(below: dict, above: dict) -> dict:
    """Returns the union of two trees; where both have a leaf, the one above wins."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def config_folder() -> Path:
    """Returns the folder of the shipped configs: inside the installed package, else at the top of the checkout."""
    package = Path(__file__).parent.parent
    return next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package / "configs")


def _culprit(path: Path, own: dict, given: dict, error: str) -> str:
    """Returns what a value out of range came from: the file, the command line, or both together."""
    overridden = list(_flatten(given))
    if any(re.match(rf"{re.escape(key)}\b", error) for key in overridden):
        return "command line"
    try:
        _build(Config, own)
    except ValueError:
        return str(path)
    return f"{path} with {', '.join(overridden)} from the command line" if overridden else str(path)


@dataclasses.dataclass(frozen=True)
class _Context:
    """What reading a file needs besides its text: see load_config."""

    world_size: int | None
    overridden: frozenset[str]  # keys set above the file, which an official file need not tell
    notes: list[str]


def _check_name(name: object) -> None:
    """Raises TypeError or ValueError for what cannot be a path or the name of a config."""
    if not isinstance(name, str | Path):
        raise TypeError(f"a config must be the path of a YAML file or a name, got {shown(name)}")
    if "\0" in str(name):
        raise ValueError(f"a config must be the path of a YAML file or a name, without NUL, got {shown(name)}")


def _check_config(config: object) -> None:
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, got {shown(config)}")


def _resolve(path_or_name: str | Path, *, beside: Path | None = None) -> Path:
    """Returns the file a path or a name stands for; paths are relative to `beside` or the working directory."""
    _check_name(path_or_name)
    if not str(path_or_name):
        raise ValueError("no config given: a YAML file, or the name of a shipped config, is needed")
    if str(path_or_name).startswith("--"):
        raise ValueError(refusal(str(path_or_name)))
    path = Path(path_or_name).expanduser()
    for candidate in (path, Path(f"{path}.yaml")):
        full = beside / candidate if beside else candidate
        if full.is_file():
            return full
    return find_config(str(path_or_name))


def _read_tree(path: Path, chain: tuple[Path, ...], context: _Context) -> dict:
    """Returns the typed tree of a file over those of its bases."""
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path.resolve()))
        raise ValueError(f"{path}: base files form a cycle: {names}")
    chain = (*chain, path.resolve())
    raw = read_yaml(path)
    if is_official(raw):
        raw = convert_official(
            _read_official(path, raw, chain), path=path, world_size=context.world_size, given=context.overridden,
            notes=context.notes,
        )  # fmt: skip
    bases = raw.pop("base", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    tree: dict = {}
    for base in bases:
        if not isinstance(base, str):
            raise ValueError(f"{path}: base must be a file or config name, or a list of them, got {shown(base)}")
        above = dataclasses.replace(context, overridden=context.overridden | frozenset(_flatten(raw)))
        tree = merge(tree, _read_tree(_resolve(base, beside=path.parent), chain, above))
    return merge(tree, _coerce_tree(raw, Config, source=str(path)))


def _read_official(path: Path, raw: dict, chain: tuple[Path, ...]) -> dict:
    """Returns the official tree of a file over those of its BASE files (paths relative to the file)."""
    bases = raw.pop("BASE", None) or []
    tree: dict = {}
    for base in filter(None, [bases] if isinstance(bases, str) else bases):
        parent = path.parent / base
        if parent.resolve() in chain:
            raise ValueError(f"{path}: BASE files form a cycle at {base}")
        if not parent.is_file():
            raise ValueError(f"{path}: BASE file {base!r} does not exist beside it")
        tree = merge(tree, _read_official(parent, read_yaml(parent), (*chain, parent.resolve())))
    return merge(tree, raw)


def _parse_overrides(overrides: Iterable[str]) -> dict:
    """Returns the typed tree of "section.key=value" words; later words win."""
    tree: dict = {}
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise TypeError(f"overrides must be a list of texts such as 'optim.lr=0.1', got {shown(overrides)}")
    for word in overrides:
        if not isinstance(word, str):
            raise TypeError(f"an override must be a text such as 'optim.lr=0.1', got {shown(word)}")
        key, equals, text = word.partition("=")
        if word.startswith("-"):
            raise ValueError(refusal(word))
        if not equals:
            raise ValueError(f"override {shown(word)} must have the form section.key=value")
        key = key.strip()
        kind = _type_of(key, source="command line")
        try:
            value = yaml.load(text, ConfigLoader)
        except yaml.YAMLError:
            value = text
        if kind is str and not isinstance(value, str):
            value = text.strip()
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, _coerce_tree(value, Config, source="command line"))
    return tree


def _coerce_tree(tree: dict, schema: Any, *, source: str, prefix: str = "") -> dict:
    """Returns the tree with every value in its field's type; raises ValueError naming source, key, value and type."""
    out: dict = {}
    for key, value in tree.items():
        full = f"{prefix}{key}"
        kind = _type_of(full, source=source)
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"{source}: {full} is a section of keys, got {shown(value)}")
            out[key] = _coerce_tree(value, kind, source=source, prefix=f"{full}.")
        else:
            try:
                out[key] = value if is_open(full, value) else _coerce(value, kind)
                if full in _PATHS and out[key].startswith("~"):  # a shell does not expand it after key=
                    out[key] = str(Path(out[key]).expanduser())
            except (TypeError, ValueError):
                allowed = describe_kind(kind, written=True)
                raise ValueError(f"{source}: {full} must be {allowed}, got {shown(value)}") from None
    return out


def _coerce(value: Any, kind: Any) -> Any:
    """Returns `value` as `kind`, a field type of schema.py; raises TypeError or ValueError where it is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, bool) or value not in arguments:
            raise ValueError(value)
        return value
    if origin is types.UnionType:
        return None if value is None else _coerce(value, next(a for a in arguments if a is not types.NoneType))
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


def _type_of(key: str, *, source: str) -> Any:
    """Returns the type of a dotted key; raises ValueError with near keys where there is none."""
    kind: Any = Config
    for part in key.split("."):
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            raise ValueError(f"{source}: unknown key {shown(key)}{_hint(key)}")
        kind = hints[part]
    return kind


def _hint(key: str) -> str:
    """Returns "; did you mean ...?": near spellings, the same last word elsewhere, or our name of an official key."""
    if told := our_key(key):
        return told
    keys = list(_schema_keys(Config))
    leaf = key.rpartition(".")[2]
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
    return f"; did you mean {', '.join(near[:3])}?" if near else f"; sections: {', '.join(get_type_hints(Config))}"


def _schema_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of the schema, sections included."""
    for name, kind in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            yield from _schema_keys(kind, f"{prefix}{name}.")


def _flatten(tree: dict, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of a tree's leaves."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _build(schema: type, tree: dict) -> Any:
    """Returns the dataclass of a typed tree; its own checks run here."""
    hints = get_type_hints(schema)
    return schema(**{k: _build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in tree.items()})


def _tree_of(section: Any) -> dict:
    """Returns a dataclass as a tree of its values, tuples kept."""
    values = ((f.name, getattr(section, f.name)) for f in dataclasses.fields(section))
    return {name: _tree_of(value) if dataclasses.is_dataclass(value) else value for name, value in values}


def _listed(value: Any) -> Any:
    """Returns the value with tuples as lists, which plain YAML can hold."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value

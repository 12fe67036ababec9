"""Configs from YAML files with `base:` inheritance and `key=value` overrides, and back to YAML.

A file whose top-level keys are the sections of the official repository (DATA, MODEL, TRAIN, ...) is read through
official.py, unchanged. The schema, with units and ranges, is schema.py.
"""

import dataclasses
import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from swin_moe.config.arguments import near_path
from swin_moe.config.checks import field_types, shown
from swin_moe.config.coerce import Word, coerce_tree, read_word, type_of
from swin_moe.config.mistaken import belongs, is_run
from swin_moe.config.official import convert_official, is_official, nest
from swin_moe.config.official_options import refusal
from swin_moe.config.schema import Config
from swin_moe.config.tasks import TaskConfig, TaskOptions, moved_key, nested, own_options, said_twice
from swin_moe.config.yaml_files import read_yaml, write_whole
from swin_moe.names.files import RUN_CONFIG

logger = logging.getLogger(__name__)

_COMMAND_LINE = "command line"  # the source of overrides, for errors


def load_config(path_or_name: str | Path, overrides: Iterable[str] = (), *, world_size: int | None = None) -> Config:
    """Returns the checked config of a file, its bases and `key=value` overrides, in rising precedence.

    `run.name` defaults to the file's name without .yaml. How gaps of an official file were filled is logged.

    Args:
        path_or_name: A YAML file, a run directory (its config, and its name and place), or a name that `find_config`
            knows.
        overrides: "section.key=value", values in YAML; a str field takes its text as it is.
        world_size: Ranks an official file was written for, if its name (`..._32gpu_...`) does not tell: experts =
            NUM_LOCAL_EXPERTS x ranks, global batch = BATCH_SIZE x ranks. None = the published recipe's batch.

    Raises:
        ValueError: With file, key and what is allowed.
    """
    return load_with_origins(path_or_name, overrides, world_size=world_size)[0]


def load_with_origins(
    path_or_name: str | Path, overrides: Iterable[str] = (), *, world_size: int | None = None
) -> tuple[Config, dict[str, str]]:
    """Returns (what load_config does, which file set an option, or that the command line did, by dotted key); options
    that nobody set, and have their defaults, are not there."""
    run = _run_directory(path_or_name)
    path = _resolve(path_or_name) if run is None else run / RUN_CONFIG
    given = _parse_overrides(overrides)
    context = _Context(world_size, frozenset(_flatten(given)), [], {})
    own = _read_tree(path, (), context)
    if "name" not in own.setdefault("run", {}):
        own["run"]["name"], context.origins["run.name"] = path.stem, "name of the file"
    if run is not None:  # wherever it was moved to
        own["run"] |= {"name": run.name, "output": str(run.parent)}
    try:
        config = _build(Config, merge(own, given))
    except ValueError as error:
        raise ValueError(f"{_culprit(path, own, given, str(error))}: {error}") from None
    for note in context.notes:
        logger.info("%s: %s", path.name, note)
    return config, context.origins | dict.fromkeys(context.overridden, _COMMAND_LINE)


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
        return _build(Config, _typed(tree, source=source))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None


def typed_tree(tree: dict, *, source: str) -> dict:
    """Returns nested values of options in their fields' types; raises ValueError with source, key and what is allowed.

    Args:
        source: What the tree came from, for errors.
    """
    return _typed(tree, source=source)


def dump_config(config: Config, path: str | Path) -> None:
    """Writes every option as YAML that load_config reads back equal; a failure leaves the file that was there.

    Raises:
        OSError: It cannot be written; names `path`.
    """
    _check_config(config)
    _check_name(path)
    if not Path(path).name:
        raise ValueError(f"dump_config: the path must be a file's, got {str(path)!r}")
    text = yaml.safe_dump(_listed(dataclasses.asdict(config)), sort_keys=False, default_flow_style=None, width=120)
    write_whole(Path(path), text)


def find_config(name: str) -> Path:
    """Returns the file of a config by its name without .yaml, in any subfolder of the installed or checked-out configs.

    Raises:
        ValueError: No file of that name (with near names), or more than one.
    """
    _check_name(name)
    folder = config_folder()
    wanted = Path(name.removesuffix(".yaml"))
    files = config_files()
    found = [f for f in files if f.with_suffix("").parts[-len(wanted.parts) :] == wanted.parts]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"config {name!r} is ambiguous: {', '.join(str(f.relative_to(folder)) for f in found)}")
    if re.match(r"[a-z_]+\.[a-z_.]+=", name):
        raise ValueError(f"a config or a run comes first, and words such as {shown(name)} after it")
    if Path(name).is_dir():
        raise ValueError(f"{name} is no config and no run{belongs(name)}")
    near = difflib.get_close_matches(wanted.name, [f.stem for f in files], n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else near_path(name)
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


def config_files() -> list[Path]:
    """Returns the shipped configs of runs and their bases; hardware/ holds machines (swin_moe/planner/hardware.py)."""
    folder = config_folder()
    return sorted(path for path in folder.rglob("*.yaml") if path.parent != folder / "hardware")


def _culprit(path: Path, own: dict, given: dict, error: str) -> str:
    """Returns what a value out of range came from: the file, the command line, or both together."""
    overridden = list(_flatten(given))
    if any(re.match(rf"{re.escape(key)}\b", error) for key in overridden):
        return _COMMAND_LINE
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
    origins: dict[str, str]  # key -> the file that set it last; grows


def _check_name(name: object) -> None:
    """Raises TypeError or ValueError for what cannot be a path or the name of a config."""
    if not isinstance(name, str | Path):
        raise TypeError(f"a config must be the path of a YAML file or a name, got {shown(name)}")
    if "\0" in str(name):
        raise ValueError(f"a config must be the path of a YAML file or a name, without NUL, got {shown(name)}")


def _check_config(config: object) -> None:
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, got {shown(config)}")


def _run_directory(path_or_name: str | Path) -> Path | None:
    """Returns the run directory that a word is the path of, or None."""
    _check_name(path_or_name)
    path = Path(path_or_name).expanduser()
    if not str(path_or_name) or not (path / RUN_CONFIG).is_file():
        return None
    return path if path.name not in ("", "..") else path.resolve()


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
            _read_official(path, raw, chain),
            path=path,
            world_size=context.world_size,
            given=context.overridden,
            notes=context.notes,
        )
    bases = raw.pop("base", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    tree: dict = {}
    for base in bases:
        if not isinstance(base, str):
            raise ValueError(f"{path}: base must be a file or config name, or a list of them, got {shown(base)}")
        above = dataclasses.replace(context, overridden=context.overridden | frozenset(_flatten(raw)))
        tree = merge(tree, _read_tree(_resolve(base, beside=path.parent), chain, above))
    typed = _typed(raw, source=str(path))
    context.origins.update(dict.fromkeys(_flatten(typed), str(path)))
    return merge(tree, typed)


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
    try:
        words = None if isinstance(overrides, str) else iter(overrides)
    except TypeError:  # also of what has the method and refuses, such as a tensor of one number
        words = None
    if words is None:
        raise TypeError(f"overrides must be a list of texts such as 'optim.lr=0.1', got {shown(overrides)}")
    given: dict[str, tuple[str, Any]] = {}  # key -> (how it was written, value)
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"an override must be a text such as 'optim.lr=0.1', got {shown(word)}")
        written, equals, text = word.partition("=")
        if word.startswith("-"):
            raise ValueError(refusal(word))
        if not equals:
            raise ValueError(f"override {shown(word)} must have the form section.key=value{_key_of(word)}")
        written = written.strip()
        key = "parallel.plan" if (written, text.strip()) == ("parallel", "auto") else moved_key(written)
        kind = type_of(key, source=_COMMAND_LINE)
        value = Word(text) if kind is Word else read_word(text, kind)
        before, value_before = given.setdefault(key, (written, value))
        if before != written and value_before != value:
            old, new = (value, value_before) if before == key else (value_before, value)
            raise ValueError(said_twice(key, old, new, source=_COMMAND_LINE))
        branch = nest({key: value})
        tree = merge(tree, _typed(branch, source=_COMMAND_LINE))
    return tree


def _key_of(word: str) -> str:
    """Returns "; did you mean data.path=WORD?" of what is there as a folder, a file or a run; else ""."""
    path = Path(word)
    if "\0" in word or not path.exists():
        return ""
    key = "data.path" if path.is_dir() and not is_run(path) else "checkpoint.load"
    return f"; did you mean {key}={shown(word)[1:-1]}?"


def _typed(tree: dict, *, source: str) -> dict:
    """Returns the tree with every value in its field's type and where its option stands today."""
    if tree.get("parallel") == "auto":  # a word for the section
        tree = tree | {"parallel": {"plan": "auto"}}
    return coerce_tree(nested(tree, source=source), source=source)


def _flatten(tree: dict, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of a tree's leaves."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _build(schema: type, tree: dict) -> Any:
    """Returns the dataclass of a typed tree; its own checks run here."""
    kinds, values = field_types(schema), {}
    for key, value in ({"own": {}} | tree if schema is TaskConfig else tree).items():
        if kinds[key] is TaskOptions:
            kind = own_options(tree.get("name", ""), needed=bool(value))
            values[key] = _build(kind, coerce_tree(value, kind, prefix="task.own."))
        else:
            values[key] = _build(kinds[key], value) if dataclasses.is_dataclass(kinds[key]) else value
    return schema(**values)


def _tree_of(section: Any) -> dict:
    """Returns a dataclass as a tree of its values, tuples kept."""
    values = ((f.name, getattr(section, f.name)) for f in dataclasses.fields(section))
    return {name: _tree_of(value) if dataclasses.is_dataclass(value) else value for name, value in values}


def _listed(value: Any) -> Any:
    """Returns the value with tuples as lists, which plain YAML can hold."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value

"""The table of formats. A format is one module here and one row: how to recognize, read and write it.

detect(path: Path) -> bool                                    looks at names and headers only, never raises
open(path: Path, options: Options) -> Source                  raises CheckpointError or CorruptionError
write(source: Source, path: Path, options: Options) -> None   through publish.publish_files, so that a kill leaves
                                                              nothing or all; every rank of options.comm calls it
plan(source: Source, path: Path, options: Options)            optional, for --dry-run: the files that `write` would
    -> dict[str, int]                                         make, with their bytes
"""

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from checkpoint_tools.files.publish import finish_publishing
from checkpoint_tools.formats.settings import check_heeded, check_settings
from checkpoint_tools.formats.state_dict import taken_off, why_unknown
from checkpoint_tools.sources.base import Options, Source
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.config.arguments import near_path
from swin_moe.config.mistaken import belongs
from swin_moe.registry import check_members, lookup


class Format(NamedTuple):
    """Lazy "module:attribute" of the functions above; "" where there is none."""

    detect: str
    open: str
    write: str
    plan: str = ""


# In the order of detection: the first whose `detect` is true is taken.
FORMATS: dict[str, Format] = {
    "native": Format(
        "checkpoint_tools.formats.native:detect",
        "checkpoint_tools.formats.native:open_native",
        "checkpoint_tools.formats.native:write_native",
        "checkpoint_tools.formats.native:plan_native",
    ),
    "official-moe": Format(
        "checkpoint_tools.formats.official.ranks:detect",
        "checkpoint_tools.formats.official.ranks:open_official_moe",
        "checkpoint_tools.formats.official.ranks:write_official_moe",
        "checkpoint_tools.formats.official.ranks:plan_official_moe",
    ),
    "safetensors": Format(
        "checkpoint_tools.formats.safetensors:detect", "checkpoint_tools.formats.safetensors:open_safetensors", ""
    ),
    "deepspeed": Format(
        "checkpoint_tools.formats.deepspeed:detect", "checkpoint_tools.formats.deepspeed:open_deepspeed", ""
    ),
    "dcp": Format(
        "checkpoint_tools.formats.dcp:detect",
        "checkpoint_tools.formats.dcp:open_dcp",
        "checkpoint_tools.formats.dcp:write_dcp",
    ),
    "fairscale": Format(
        "checkpoint_tools.formats.official.fairscale:detect",
        "checkpoint_tools.formats.official.fairscale:open_fairscale",
        "checkpoint_tools.formats.official.fairscale:write_fairscale",
    ),
    "simmim": Format(
        "checkpoint_tools.formats.official.simmim:detect",
        "checkpoint_tools.formats.official.simmim:open_simmim",
        "checkpoint_tools.formats.official.simmim:write_simmim",
    ),
    "dense": Format(
        "checkpoint_tools.formats.official.dense:detect",
        "checkpoint_tools.formats.official.dense:open_dense",
        "checkpoint_tools.formats.official.dense:write_dense",
    ),
    "tutel": Format(
        "checkpoint_tools.formats.official.tutel:detect",
        "checkpoint_tools.formats.official.tutel:open_tutel",
        "checkpoint_tools.formats.official.tutel:write_tutel",
    ),
    "timm": Format(
        "checkpoint_tools.formats.timm:detect",
        "checkpoint_tools.formats.timm:open_timm",
        "checkpoint_tools.formats.timm:write_timm",
    ),
    "hf": Format(
        "checkpoint_tools.formats.hf:detect",
        "checkpoint_tools.formats.hf:open_hf",
        "checkpoint_tools.formats.hf:write_hf",
    ),
    "official": Format(
        "checkpoint_tools.formats.official.single:detect",
        "checkpoint_tools.formats.official.single:open_official",
        "checkpoint_tools.formats.official.single:write_official",
        "checkpoint_tools.formats.official.single:plan_official",
    ),
}


def find_format(path: Path, *, advice: bool = True) -> str:
    """Returns the name of the format that recognizes `path`.

    Args:
        advice: Whether an error names --from, which only the verbs have.

    Raises:
        CheckpointError: None does; says what the path is instead, and what to give.
    """
    path = as_path(path)
    refuse_part(path)
    for name, row in FORMATS.items():
        if row.detect and lookup({name: row.detect}, name, key="--from")(path):
            return name
    if not path.exists():
        others = sorted(
            other.name for other in path.parent.glob(f"{glob.escape(path.name)}.*") if _RANK_FILE.fullmatch(other.name)
        )
        found = f", but there is {others[0]}: .rank0 is missing" if others else near_path(path)
        raise CheckpointError(f"{path}: does not exist{found}")
    clause = belongs(path)
    if path.is_file() and clause:
        raise CheckpointError(f"{path}: is neither a file of torch.save nor a safetensors file{clause}")
    kind = why_unknown(path) if path.is_file() else "is no checkpoint of a known format"
    remedy = clause or (f"; name one with --from ({', '.join(FORMATS)})" if advice else "")
    raise CheckpointError(f"{path}: {kind}{remedy}")


# A file of a checkpoint of many: what its name matches -> what shows that its directory is one.
_PARTS = (
    (r"shard-\d{5,}\.safetensors|index\.json|provenance\.json", "index.json"),
    (r"__\d+_\d+\.distcp|\.metadata", ".metadata"),
    (r"(model|pytorch_model)-\d{5}-of-\d{5}\.\w+|config\.json", "config.json"),
    (r".*_(optim|model)_states\.pt", "mp_rank_00_model_states.pt"),
    (r".*_(optim|model)_states\.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
)


_RANK_FILE = re.compile(r"(.+)\.(rank\d+|master)")


def refuse_part(path: Path) -> None:
    """Raises CheckpointError for one file of a checkpoint of many; says what to give instead."""
    match = _RANK_FILE.fullmatch(path.name)
    whole = path.with_name(match[1]) if match else path
    if match and any(whole.with_name(f"{whole.name}{end}").is_file() for end in (".rank0", ".rank1", ".master")):
        raise CheckpointError(f"{path}: is one of several rank files; give their path without .{match[2]}: {whole}")
    for pattern, beside in _PARTS:
        if path.is_file() and re.fullmatch(pattern, path.name) and (path.parent / beside).is_file():
            raise CheckpointError(f"{path}: is one file of a checkpoint; give its directory: {path.parent}")


def as_path(path: Path | str) -> Path:
    """Returns the path of a checkpoint; raises TypeError or CheckpointError where it cannot be one."""
    if not isinstance(path, Path | str):
        raise TypeError(f"the path of a checkpoint must be text or a Path, got {path!r}")
    try:
        named = "\0" not in str(path) and bool(Path(path).resolve().name)
    except (RuntimeError, OSError):  # the former until Python 3.12
        raise CheckpointError(f"{path}: cannot be opened: its symbolic links lead back to themselves") from None
    if not named:
        raise CheckpointError(f"the path of a checkpoint must name a file or folder, got {str(path)!r}")
    return Path(path)


def _check_options(options: Options) -> None:
    if not isinstance(options, Options):
        raise TypeError(f"options must be an Options of checkpoint_tools.sources.base, got {options!r}")
    check_settings(options)


def _look_up(rows: dict[str, str], name: str, key: str) -> Callable:
    """Returns the function of a format; raises ValueError with the formats there are."""
    if not isinstance(name, str):
        raise TypeError(f"{key} takes the name of a format ({', '.join(rows)}), got {name!r}")
    return lookup(rows, name, key=key)


def open_source(path: Path, options: Options, name: str = "") -> Source:
    """Returns the opened checkpoint at `path`; the format is guessed where `name` is empty."""
    path = as_path(path)
    _check_options(options)
    finish_publishing(path)
    name = name or find_format(path)
    source = _look_up({key: row.open for key, row in FORMATS.items() if row.open}, name, "--from")(path, options)
    check_members(source, Source, chosen=f"--from {name}", where="checkpoint_tools/sources/base.py: Source")
    if options.extra.keys() & {"img_size", "window_size"}:
        from checkpoint_tools.formats.geometry import check_given  # only here: it loads the formats that ask it, too

        check_given(path, source.config.get("model", {}), {key: t.shape for key, t in source.tensors.items()})
    taken = taken_off(path) or taken_off(path.with_name(f"{path.name}.rank0"))
    if taken:
        options.report(f"{path}: read {taken}")
    return source


def plan_output(source: Source, path: Path, options: Options, name: str = "native") -> dict[str, int] | None:
    """Returns the files that write_checkpoint would make, with their bytes; None where the format cannot tell."""
    check_heeded(source, name, options, tuple(FORMATS))
    row = FORMATS[name].plan
    return lookup({name: row}, name, key="--to")(source, path, options) if row else None


def write_checkpoint(source: Source, path: Path, options: Options, name: str = "native") -> None:
    """Writes any source as a new checkpoint of the format `name`; nothing may be at `path` yet."""
    _check_options(options)
    write = _look_up({key: row.write for key, row in FORMATS.items() if row.write}, name, "--to")
    check_heeded(source, name, options, tuple(FORMATS))
    write(source, as_path(path), options)

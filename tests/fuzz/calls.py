"""Draws calls of the Python entry points with arguments of wrong kinds."""

import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import swin_moe
from checkpoint_tools.formats import FORMATS, find_format, open_source, write_checkpoint
from checkpoint_tools.sources.base import Options
from swin_moe import config as schema
from swin_moe.config.io import apply_overrides, config_from_tree, dump_config, find_config, load_config

_SECTIONS = (
    "RunConfig DataConfig MoEConfig ModelConfig TaskConfig ClassifyOptions SimMIMOptions DistillOptions MoBYOptions "
    "OptimConfig ParallelConfig EngineConfig CheckpointConfig LogConfig DebugConfig CompatConfig"
)
SECTIONS = [getattr(schema, name) for name in _SECTIONS.split()]
SMALL: dict[str, Any] = dict(img_size=16, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3)
VALUES = [
    None,
    "x",
    "",
    0,
    -1,
    3,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    True,
    [],
    [1],
    (),
    (1, 2, 3),
    [[1]],
    {},
    {"a": 1},
    b"x",
    object(),
    torch.ones(2),
    torch.ones(()),
    range(3),
    "é☃",
    "a\0b",
    ("x",),
    [None],
    1j,
    int,
    {1, 2},
    -0.0,
]
# Names of arguments: what a sentence may name beside keys and files.
_SUBJECTS = (
    "load_official create_model build_model parallelize moe config override image path format max_memory model tensor "
    "source interpolation seed"
)
# Arguments of the official constructors, and one of nobody: of two wrong arguments either may be named.
_OFFICIAL = (
    "moe_blocks top_value cosine_router use_bpr is_gshard_loss seed moe_drop norm_layer use_checkpoint nope "
    "num_local_experts"
).split()
SUBJECTS = (*_SUBJECTS.split(), *_OFFICIAL, "state dict")

Call = tuple[str, str, Callable[[], Any]]


def draw_call(draw: random.Random, files: dict[str, str]) -> Call:
    """Returns (function, what is called, the call)."""
    return draw.choice(_CALLS)(draw, files)


def _short(value: object) -> str:
    return repr(value)[:80]


def _create(draw: random.Random, files: dict[str, str]) -> Call:
    name: Any
    names = [f.name for section in (schema.ModelConfig, schema.MoEConfig) for f in fields(section) if f.name != "name"]
    names += _OFFICIAL
    name = draw.choice(["swin", "swin_moe", "swinv2", "swin_mlp"])
    given = {key: draw.choice(VALUES) for key in draw.sample(names, draw.choice((1, 1, 2)))}
    if draw.random() < 0.25:
        name = draw.choice([*VALUES, *files.values()])
        given = {}
    text = f"create_model({_short(name)}, **{SMALL | given})"
    return "create_model", text, lambda: swin_moe.create_model(name, **(SMALL | given if given else {}))


def _section(draw: random.Random, files: dict[str, str]) -> Call:
    section = draw.choice(SECTIONS)
    given = {draw.choice(fields(section)).name: draw.choice(VALUES) for _ in range(draw.choice((1, 1, 2)))}
    return section.__name__, f"{section.__name__}(**{given})", lambda: section(**given)


def _config(draw: random.Random, files: dict[str, str]) -> Call:
    value: Any = draw.choice([*VALUES, *files.values()])
    other: Any = draw.choice(VALUES)
    small = files["small.yaml"]
    name, call = draw.choice(
        [
            ("load_config", lambda: load_config(value)),
            ("load_config", lambda: load_config(small, value)),
            ("load_config", lambda: load_config(small, [value])),
            ("load_config", lambda: load_config(small, world_size=value)),
            ("apply_overrides", lambda: apply_overrides(value, ["optim.lr=1"])),
            ("apply_overrides", lambda: apply_overrides(schema.Config(), other)),
            ("config_from_tree", lambda: config_from_tree(value, source="tree of config")),
            ("config_from_tree", lambda: config_from_tree({"model": other}, source="tree of config")),
            ("config_from_tree", lambda: config_from_tree({"model": {"depths": other}}, source="tree of config")),
            ("find_config", lambda: find_config(value)),
            ("dump_config", lambda: dump_config(schema.Config(), value)),
            ("dump_config", lambda: dump_config(value, "/dev/null")),
        ]
    )
    return name, f"{name}({_short(value)} or {_short(other)})", call


def _official(draw: random.Random, files: dict[str, str]) -> Call:
    def call() -> None:
        model = swin_moe.create_model("swin", **SMALL, pretrained_window_sizes=(0, 0))
        state = dict(model.state_dict())
        name = draw.choice(list(state))
        changes = [{name: value}, {value if isinstance(value, str | int | float) else "x": state[name]}]
        given = draw.choice([value, state | draw.choice(changes), {"model": value}, {"model": state | changes[0]}])
        arguments = draw.choice(
            [(model, given), (given, model), (value, state), (model, state | {name: state[name].T})]
        )
        swin_moe.load_official(*arguments, **draw.choice([{}, {"strict": False}, {"interpolation": value}]))

    value: Any = draw.choice(VALUES)
    return "load_official", f"load_official(... {_short(value)})", call


def _model(draw: random.Random, files: dict[str, str]) -> Call:
    """Returns calls of the network with images that are none, and of what builds and spreads it."""
    value: Any = draw.choice(VALUES)
    images = [
        value,
        torch.ones(3, 16, 16),
        torch.ones(1, 1, 16, 16),
        torch.ones(1, 16, 16, 3),
        torch.ones(0, 3, 16, 16),
        torch.ones(1, 3, 16, 16).long(),
        torch.ones(1, 3, 16, 16).half(),
        torch.ones(1, 3, 0, 16),
        torch.ones(3),
        torch.ones(1, 3, 3, 3),
        torch.ones(1, 3, 16, 16, dtype=torch.complex64),
    ]
    image = draw.choice(images)
    family = draw.choice(["swin", "swinv2", "swin_mlp", "swin_moe"])
    name, call = draw.choice(
        [
            ("model", lambda: swin_moe.create_model(family, **SMALL)(image)),
            ("model", lambda: swin_moe.create_model(family, **SMALL)(image)),
            ("build_model", lambda: swin_moe.build_model(value)),
            ("build_model", lambda: swin_moe.build_model(schema.ModelConfig(**SMALL), recompute=value)),
            ("parallelize", lambda: swin_moe.parallelize(value, schema.ParallelConfig(), value)),
            ("parallelize", lambda: swin_moe.parallelize(swin_moe.create_model("swin", **SMALL), value, value)),
        ]
    )
    shown = f"{tuple(image.shape)} {image.dtype}" if isinstance(image, torch.Tensor) else _short(image)
    return name, f"{name}: {family}, {shown}, {_short(value)}", call


def _tools(draw: random.Random, files: dict[str, str]) -> Call:
    quiet = Options(report=lambda text: None)
    value: Any = draw.choice(VALUES)
    path: Any = draw.choice(list(files.values()))
    form: Any = draw.choice([*FORMATS, "nope", "", value])
    option = draw.choice([f.name for f in fields(Options) if f.name not in ("comm", "report", "progress")])

    def write() -> None:
        with open_source(Path(files["native"]), quiet) as source:
            write_checkpoint(source, draw.choice([value, Path(path)]), quiet, form)

    name, call = draw.choice(
        [
            ("open_source", lambda: open_source(Path(path), quiet, form).close()),
            ("open_source", lambda: open_source(path, quiet).close()),
            ("open_source", lambda: open_source(value, quiet).close()),
            ("open_source", lambda: open_source(Path(files["native"]), value).close()),
            ("find_format", lambda: find_format(value)),
            ("Options", lambda: Options(**{option: value})),
            ("write_checkpoint", write),
        ]
    )
    return name, f"{name}({_short(path)}, {_short(form)}, {option}, {_short(value)})", call


_CALLS = (_create, _create, _section, _config, _official, _model, _tools)

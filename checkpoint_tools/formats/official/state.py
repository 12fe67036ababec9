"""What an official training file holds beside its weights: optimizer state by name, options, and the rest as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint_tools.files.pickle_reader import Options as OptionDict
from checkpoint_tools.files.pickle_reader import plain
from checkpoint_tools.files.record_file import RecordFile, TensorRecord
from checkpoint_tools.formats.infer import merge_model
from checkpoint_tools.formats.official.layout import frozen_bias, group_names, is_buffer
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW
from swin_moe.config.io import config_from_tree
from swin_moe.config.official import OFFICIAL, convert_official, leaves, nest
from swin_moe.config.state import canonical_config
from swin_moe.layout import Chunk

KEPT = ("lr_scheduler", "max_accuracy", "scaler", "epoch")  # copied to state["official"] and back, in this order

_LOCAL_EXPERTS, _LOCAL_BATCH = "MODEL.SWIN_MOE.NUM_LOCAL_EXPERTS", "DATA.BATCH_SIZE"


class Moments(NamedTuple):
    """An official optimizer's state: kind (exp_avg, ...) -> official parameter name -> tensor; and its step."""

    tensors: dict[str, dict[str, TensorRecord]]
    step: int | None  # None: the optimizer counts no steps (SGD), and nothing else in the file tells
    groups: list[dict[str, Any]]  # options of each group, without its parameters


def read_moments(content: Mapping[str, Any], file: RecordFile, shapes: Mapping[str, tuple[int, ...]]) -> Moments | None:
    """Returns the optimizer state of an official file, or None where it has none.

    A number stands for each parameter there: names come from the official grouping rule, and every tensor's shape is
    compared with its parameter's.

    Args:
        shapes: Name -> shape of the model's tensors in this file, in its order, which is that of the parameters.

    Raises:
        CheckpointError: Numbers and names do not fit together; names the file and the parameter.
    """
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, dict):
        return None
    groups, states = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict) or not _is_numbered(groups, states):
        raise CheckpointError(f"{file.path}: its optimizer is not that of torch: param_groups and state by number")
    order = [name for name in shapes if not is_buffer(name)]
    if sum(len(group["params"]) for group in groups) < len(order):
        order = [name for name in order if not frozen_bias(name)]
    try:
        named = group_names(groups, {name: shapes[name] for name in order})
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    tensors: dict[str, dict[str, TensorRecord]] = {}
    step = None
    for group, names in zip(groups, named):
        for number, name in zip(group["params"], names):
            for kind, value in states.get(number, {}).items():
                if kind == "step":
                    step = max(step or 0, whole_number(value, file))
                elif isinstance(value, TensorRecord):
                    if value.shape != shapes[name]:
                        raise CheckpointError(
                            f"{file.path}: optimizer {kind} number {number} has shape {value.shape}, its parameter "
                            f"{name} has {shapes[name]}"
                        )
                    tensors.setdefault(kind, {})[name] = value
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    if step is None:
        step = steps_of_schedule(content) if tensors else 0
    return Moments(tensors, step, plain(options, file.path))


def _is_numbered(groups: list[Any], states: dict[Any, Any]) -> bool:
    """Returns whether every group lists numbers of parameters, and what there is for a number is a dict."""
    return all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(type(number) is int and isinstance(states.get(number, {}), dict) for number in group["params"])
        for group in groups
    )


def steps_of_schedule(content: Mapping[str, Any]) -> int | None:
    """Returns the optimizer steps behind an official file by its epoch and scheduler; None where they do not tell.

    The scheduler counts in steps what the options count in epochs (microsoft/Swin-Transformer, lr_scheduler.py:
    t_initial, warmup_t, decay_t), and every ratio of the two must be the same whole number: the steps of an epoch.
    """
    epoch, schedule, tree = (content.get(key) for key in ("epoch", "lr_scheduler", "config"))
    train = tree.get("TRAIN") if isinstance(tree, dict) else None
    if not isinstance(schedule, dict) or not isinstance(train, dict) or type(epoch) is not int or epoch < 0:
        return None
    options = train.get("LR_SCHEDULER")
    options = options if isinstance(options, dict) else {}
    warmup, total = schedule.get("warmup_t", 0), schedule.get("t_initial")
    if options.get("WARMUP_PREFIX") and isinstance(total, int) and isinstance(warmup, int):
        total += warmup  # the prefix is no part of it there
    pairs = (
        (total, train.get("EPOCHS")),
        (warmup, train.get("WARMUP_EPOCHS")),
        (schedule.get("decay_t"), options.get("DECAY_EPOCHS")),
    )
    ratios = {steps / epochs for steps, epochs in pairs if type(steps) is int and type(epochs) is int and epochs > 0}
    per_epoch = next(iter(ratios)) if len(ratios) == 1 else 0
    return (epoch + 1) * int(per_epoch) if per_epoch > 0 and per_epoch == int(per_epoch) else None


def whole_number(value: Any, file: RecordFile) -> int:
    """Returns a step: a number, or since torch 1.12 a scalar tensor."""
    if isinstance(value, TensorRecord) and value.shape in ((), (1,)) and value.dtype in ("F32", "I64"):
        data = np.empty(value.shape, RAW[DTYPE_BYTES[value.dtype]])
        file.read(value, Chunk.whole(value.shape), data)
        value = data.view({"F32": "<f4", "I64": "<i8"}[value.dtype]).reshape(-1)[0].item()
    if not isinstance(value, int | float) or value < 0 or value != int(value):
        raise CheckpointError(f"{file.path}: the optimizer's step is {value!r}, not a whole number")
    return int(value)


def training_state(content: Mapping[str, Any], moments: Moments | None, config: dict[str, Any], path: Path) -> dict:
    """Returns state as train.py resumes from it, where the file tells enough, and what is official only beside it."""
    kept = {key: plain(content[key], path) for key in KEPT if key in content}
    if moments is not None:
        kept["param_groups"] = moments.groups
    options = content.get("config")
    if isinstance(options, OptionDict | dict):
        kept["config"] = _without_ranks(plain(options, path))
    state: dict[str, Any] = {"official": kept} if kept else {}
    batch = config.get("data", {}).get("global_batch")
    if moments is None or not batch:
        return state
    scaler = kept["scaler"] if isinstance(kept.get("scaler"), dict) else {}
    value, good_steps = scaler.get("scale", 1.0), scaler.get("_growth_tracker", 0)
    known = isinstance(value, int | float) and isinstance(good_steps, int)
    scale = {"value": float(value) if known else 1.0, "good_steps": good_steps if known else 0}
    best = kept.get("max_accuracy")
    progress = {
        "step": moments.step,
        "samples": moments.step * batch,
        "best": best if isinstance(best, int | float) else None,
        "skipped": 0,
        "global_batch": batch,
    }
    name = "adamw" if "exp_avg" in moments.tensors else "sgd"
    engine = {"updates": moments.step, "loss_scale": scale, "optimizer": name}
    return state | {"progress": progress, "engine": engine, "seed": config.get("run", {}).get("seed", 0)}


def _without_ranks(tree: dict) -> dict:
    """Returns official options without those that depend on the number of ranks; with_ranks puts them back."""
    return nest({key: value for key, value in leaves(tree) if key not in (_LOCAL_EXPERTS, _LOCAL_BATCH)})


def with_ranks(tree: dict, config: Mapping[str, Any], world: int) -> dict:
    """Returns official options for this many ranks, so that experts and global batch stay what they are in `config`."""
    flat = dict(leaves(tree))
    experts = config.get("model", {}).get("moe", {}).get("num_experts", 0)
    if experts and config["model"].get("moe", {}).get("blocks"):
        flat[_LOCAL_EXPERTS] = experts // world if world <= experts else -(world // experts)
    batch, steps = config.get("data", {}).get("global_batch", 0), flat.get("TRAIN.ACCUMULATION_STEPS", 1)
    if batch and batch % (world * steps) == 0:
        flat[_LOCAL_BATCH] = batch // (world * steps)
    return nest(flat)


def native_config(
    content: Mapping[str, Any], inferred: dict[str, Any], path: Path, options: Options, *, world: int = 0
) -> dict[str, Any]:
    """Returns config as the index holds it, from the options in an official file and what its tensors are.

    What the tensors determine wins: an official YAML says experts per rank, not experts.
    """
    tree = content.get("config") if isinstance(content, Mapping) else None
    config: dict[str, Any] = {}
    if isinstance(tree, dict):
        known = {key: value for key, value in leaves(plain(tree, path)) if _is_usable(key)}
        try:
            converted = convert_official(nest(known), path=path, world_size=world or None)
            config = canonical_config(dataclasses.asdict(config_from_tree(converted, source=str(path))))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            options.report(f"its options are kept as they are, but not as ours: {error}")
    return json.loads(json.dumps(merge_model(config, inferred)))


def _is_usable(key: str) -> bool:
    return key in OFFICIAL and not OFFICIAL[key].only

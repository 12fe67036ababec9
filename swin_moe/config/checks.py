"""How options are refused, and which options contradict each other. Plain data; schema.py is the schema."""

import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from swin_moe.config.choices import CHOICES, facts_of
from swin_moe.registry import is_outside

# Metadata of an option of layout, host or schedule of I/O: the bytes of a checkpoint are the same whatever it says. The
# full config stands in provenance.json.
NOT_STATE = {"state": False}
_SHOWN = 120  # characters of a refused value
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raises ValueError with key, value and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"{key} must be {allowed}, got {shown(value)}")


def shown(value: object) -> str:
    """Returns a refused value as a sentence shows it: its beginning where it is long."""
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:  # Python writes out no more than 4,300 digits
        return "a number of too many digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


# Options whose value may be "package.module:Name", a variant that lives elsewhere (see registry.lookup).
OPEN = ("data.name", "task.name", "engine.name", "model.moe.router", "model.moe.choice")


def is_open(key: str, value: object) -> bool:
    """Returns whether the value of an option is a variant that lives elsewhere; `value` may be the option's section."""
    return key in OPEN and is_outside(getattr(value, key.rpartition(".")[2], value))


def check_choices(section: Any, prefix: str) -> None:
    """Raises ValueError for a field of another type, a Literal that is none of its choices, a number out of range."""
    for name, kind in field_types(type(section)).items():
        value, key = getattr(section, name), f"{prefix}.{name}"
        if not _fits(value, kind) and not is_open(key, value):
            check(False, key, value, describe_kind(kind))
    check_ranges(section, prefix)


def field_types(section: Any) -> Mapping[str, Any]:
    """Returns name -> type of a dataclass's fields, also where its module writes annotations as texts."""
    return _field_types(section)


@functools.cache  # asked some 200 times as a config is read, which takes twice as long without
def _field_types(section: Any) -> Mapping[str, Any]:
    hints = get_type_hints(section)
    return {f.name: hints[f.name] for f in fields(section)}


def describe_kind(kind: Any, *, written: bool = False) -> str:
    """Returns a field's type in words.

    Args:
        written: In YAML, where texts have quotes and one number stands for a list of it.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin in (types.UnionType, Union):
        return " or ".join("null" if a is types.NoneType else describe_kind(a) for a in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        if get_origin(arguments[0]) is tuple:
            return "a list of lists such as [[1, 2], [3]]"
        return f"a list, each item {describe_kind(arguments[0])}"
    if origin is tuple:
        one = describe_kind(arguments[0])
        return f"{one} or a list of {len(arguments)} of them" if written else f"{len(arguments)} items, each {one}"
    if kind is str and written:
        return "text (in quotes)"
    return _WORDS.get(kind) or f"a {kind.__name__}"


def _fits(value: Any, kind: Any) -> bool:
    """Returns whether a value is of a field's type. Ranges, and whether a number is finite, are checked afterwards."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(isinstance(value, type(choice)) and value == choice for choice in arguments)
    if origin in (types.UnionType, Union):
        return any(value is None if a is types.NoneType else _fits(value, a) for a in arguments)
    if origin is tuple:
        sized = isinstance(value, (tuple, list)) and (arguments[-1] is Ellipsis or len(value) == len(arguments))
        return sized and all(_fits(item, arguments[0]) for item in value)
    if is_dataclass(kind) or kind is str:
        return isinstance(value, kind)  # type: ignore[arg-type]
    if kind is bool:
        return isinstance(value, Integral) and value in (0, 1)
    return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)


# (option, its value, other option, values of that which go with it, why).
EXCLUSIONS: tuple[tuple[str, Any, str, tuple, str], ...] = (
    ("scores", "sigmoid", "balance_loss", ("gshard", "none"), "load_importance is about the noise of softmax logits"),
    ("scores", "softmax", "bias_rate", (0.0,), "the bias is added to model.moe.scores=sigmoid"),
    ("balance_loss", "none", "balance_scope", ("group",), "there is no loss to balance by"),
)


def check_routing(moe: Any) -> None:
    """Raises ValueError where routing options of a MoEConfig are out of range or contradict each other."""
    known = moe.choice in CHOICES or is_outside(moe.choice)
    check(known, "model.moe.choice", moe.choice, f"one of {', '.join(CHOICES)}")
    own = (("choice", moe.choice, *excluded) for excluded in facts_of(moe).excludes)
    for option, value, other, fitting, why in (*EXCLUSIONS, *own):
        if getattr(moe, option) == value:
            words = " or ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in fitting)
            reason = f"{words} with model.moe.{option}={value} ({why})"
            check(getattr(moe, other) in fitting, f"model.moe.{other}", getattr(moe, other), reason)
    for name in ("bias_rate", "z_loss_weight", "aux_loss_weight", "gate_noise"):
        check(getattr(moe, name) >= 0, f"model.moe.{name}", getattr(moe, name), ">= 0")
    check(moe.slots >= 1, "model.moe.slots", moe.slots, ">= 1")
    check(moe.shared_experts >= 0, "model.moe.shared_experts", moe.shared_experts, ">= 0 (0 = none)")
    groups, limit, experts = moe.expert_groups, moe.group_limit, moe.num_experts
    divides = groups >= 1 and experts % groups == 0
    check(divides, "model.moe.expert_groups", groups, f"a divisor of model.moe.num_experts={experts}")
    check(0 <= limit <= groups, "model.moe.group_limit", limit, f"in [1, {groups}] groups, or 0 for no limit")
    if limit:
        most = limit * experts // groups
        check(moe.top_k <= most, "model.moe.top_k", moe.top_k, f"at most {most}, the experts of {limit} expert groups")
        estimate = limit == groups or moe.balance_loss != "load_importance"
        allowed = "gshard or none with model.moe.group_limit (its load term knows no groups)"
        check(estimate, "model.moe.balance_loss", moe.balance_loss, allowed)
    for holds, option, value, allowed in facts_of(moe).requirements(moe):
        check(holds, f"model.moe.{option}", value, allowed)


def check_task(config: Any, *, forwards: int) -> None:
    """Raises ValueError where a Config's task does not fit its other sections. forwards: Of one optimizer step."""
    check_freeze(config)
    model = config.model
    check(model.in_chans == 3, "model.in_chans", model.in_chans, "3 with the data sets, whose images are RGB")
    dense, name = config.data.dense, config.task.name
    if not config.task.options.learns_unlabelled:  # it would learn that nothing is in them
        allowed = f"drop with task.name={name}, which learns from labels alone; task.name=soft_teacher takes both"
        check(dense.unlabelled == "drop", "data.dense.unlabelled", dense.unlabelled, allowed)
        allowed = f"empty with task.name={name}, which learns from labels alone; task.name=soft_teacher takes both"
        check(not dense.unlabelled_images, "data.dense.unlabelled_images", dense.unlabelled_images, allowed)
    config.task.options.check(config, forwards=forwards)


def check_freeze(config: Any) -> None:
    """Raises ValueError where optim.freeze has nothing to freeze, or nothing is left to train."""
    freeze, has_experts = config.optim.freeze, config.model.moe.has_blocks
    if freeze in ("experts", "moe"):
        check(has_experts, "optim.freeze", freeze, "none or backbone for a model without MoE blocks")
    if freeze == "backbone":
        with_head = config.task.options.classifies and config.model.num_classes > 0
        check(with_head, "optim.freeze", freeze, "none, experts or moe without a class head to train")


def _range(low: float | None, high: float | None = None, *, above: bool = False, below: bool = False) -> tuple:
    """Returns (test, words) of a range; above, below: its ends do not belong to it."""
    words = "" if low is None else f"{'>' if above else '>='} {low:g}"
    if high is not None:
        words = f"in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"

    def holds(value: float) -> bool:
        after = low is None or (value > low if above else value >= low)
        return after and (high is None or (value < high if below else value <= high))

    return holds, words


_COUNT, _SOME, _POSITIVE, _SHARE = _range(0), _range(1), _range(0, above=True), _range(0, 1)
_BELOW_ONE, _ANY = _range(0, 1, below=True), _range(None)
MOST_THREADS = 4096  # more than any machine's cores; OpenMP crashes on counts that it cannot start

# Every numeric option; items of a list are checked one by one. What depends on other options is checked in schema.py.
RANGES: dict[str, tuple] = {
    "run.seed": _range(0, 2**63 - 1),
    "data.global_batch": _SOME, "data.micro_batch": _COUNT, "data.eval_batch": _COUNT, "data.images_per_class": _COUNT,
    "data.subset": _COUNT, "data.workers": _range(0, 1024), "data.crop_scale": _range(0, 1, above=True),
    "data.hflip": _SHARE,
    "data.color_jitter": _COUNT, "data.erase_prob": _SHARE, "data.erase_count": _SOME, "data.synthetic_samples": _SOME,
    "data.dense.min_side": _COUNT, "data.dense.canvas_seed": _range(0, 2**63 - 1), "data.dense.canvas_size": _SOME,
    "data.dense.canvas_digits": _COUNT, "data.dense.digit_size": _SOME, "data.dense.canvases": _SOME,
    "data.dense.val_canvases": _SOME, "data.dense.labelled": _range(0, 1, above=True), "data.dense.short": _SOME,
    "data.dense.long": _SOME, "data.dense.ratio": _POSITIVE, "data.dense.crop_short": _SOME,
    "data.dense.crop_sides": _SOME, "data.dense.crop": _COUNT, "data.dense.crop_max_share": _range(0, 1, above=True),
    "data.dense.rotate": _range(0, 180), "data.dense.shear": _range(0, 89), "data.dense.translate": _SHARE,
    "data.dense.sample_ratio": _SOME, "data.dense.erase": _COUNT, "data.dense.erase_side": _SHARE,
    "data.dense.eval_short": _COUNT, "data.dense.eval_long": _SOME, "data.dense.divisor": _SOME,
    "model.moe.blocks": _range(-1), "model.moe.num_experts": _SOME, "model.moe.top_k": _SOME,
    "model.moe.capacity_factor": _ANY, "model.moe.eval_capacity_factor": _ANY, "model.moe.group_images": _COUNT,
    "model.moe.slots": _SOME, "model.moe.bias_rate": _COUNT, "model.moe.expert_groups": _SOME,
    "model.moe.group_limit": _COUNT, "model.moe.aux_loss_weight": _COUNT, "model.moe.z_loss_weight": _COUNT,
    "model.moe.gate_noise": _COUNT, "model.moe.cosine_dim": _SOME, "model.moe.cosine_init_t": _POSITIVE,
    "model.moe.shared_experts": _COUNT, "model.moe.dropout": _BELOW_ONE, "model.moe.overlap": _SOME,
    "model.img_size": _SOME, "model.patch_size": _SOME, "model.in_chans": _SOME, "model.num_classes": _COUNT,
    "model.embed_dim": _SOME, "model.depths": _SOME, "model.num_heads": _SOME, "model.window_size": _SOME,
    "model.mlp_ratio": _POSITIVE, "model.qk_scale": _ANY, "model.drop_rate": _BELOW_ONE,
    "model.attn_drop_rate": _BELOW_ONE, "model.drop_path_rate": _BELOW_ONE, "model.init_std": _COUNT,
    "model.pretrained_window_sizes": _range(0, 2**31 - 1), "model.extra_norm_every": _COUNT,
    "model.attention_chunk": _COUNT,
    "model.post_norm_init": _ANY,
    "task.classify.label_smoothing": _SHARE, "task.classify.mixup": _COUNT, "task.classify.cutmix": _COUNT,
    "task.classify.mix_prob": _SHARE, "task.classify.mix_switch_prob": _SHARE, "task.simmim.mask_patch_size": _SOME,
    "task.simmim.mask_ratio": _range(0, 1, above=True, below=True), "task.simmim.target_window": _COUNT,
    "task.simmim.pictures": _COUNT, "task.distill.smooth_l1_beta": _POSITIVE, "task.moby.momentum": _SHARE,
    "task.detect.channels": _SOME, "task.detect.frozen_stages": _range(-1), "task.detect.anchor_scale": _POSITIVE,
    "task.detect.anchor_ratios": _POSITIVE, "task.detect.anchor_border": _range(-1), "task.detect.anchors": _SOME,
    "task.detect.proposal_beta": _POSITIVE, "task.detect.proposal_overlap": _SHARE,
    "task.detect.proposals_per_level": _SOME, "task.detect.proposals": _SOME, "task.detect.stage_overlaps": _SHARE,
    "task.detect.stage_stds": _POSITIVE, "task.detect.stage_weights": _range(0), "task.detect.crowd_overlap": _SHARE,
    "task.detect.neck_repeats": _SOME, "task.detect.norm_groups": _SOME, "task.detect.point_convs": _COUNT,
    "task.detect.point_shared_convs": _COUNT, "task.detect.corner_channels": _SOME,
    "task.detect.point_scale": _POSITIVE,
    "task.detect.boxes": _SOME, "task.detect.finest_scale": _POSITIVE, "task.detect.box_convs": _COUNT,
    "task.detect.box_conv_channels": _SOME, "task.detect.box_fcs": _COUNT, "task.detect.box_fc_channels": _SOME,
    "task.detect.box_beta": _POSITIVE, "task.detect.box_loss_weight": _range(0), "task.detect.mask_convs": _COUNT,
    "task.detect.mask_channels": _SOME, "task.detect.semantic_classes": _range(0, 255),
    "task.detect.semantic_weight": _range(0), "task.detect.score": _SHARE, "task.detect.overlap": _SHARE,
    "task.detect.detections": _SOME, "task.detect.mask_threshold": _SHARE, "task.detect.pictures": _COUNT,
    "task.detect.picture_score": _SHARE, "task.detect.scales": _POSITIVE,
    "task.soft_teacher.momentum": _SHARE, "task.soft_teacher.found_score": _SHARE,
    "task.soft_teacher.proposal_score": _SHARE, "task.soft_teacher.class_score": _SHARE,
    "task.soft_teacher.box_spread": _range(0), "task.soft_teacher.jitters": _range(2),
    "task.soft_teacher.jitter": _POSITIVE, "task.soft_teacher.weight": _range(0),
    "task.segment.channels": _SOME, "task.segment.pool_scales": _SOME, "task.segment.dropout": _BELOW_ONE,
    "task.segment.auxiliary_channels": _COUNT, "task.segment.auxiliary_index": _COUNT,
    "task.segment.auxiliary_weight": _range(0), "task.segment.frozen_stages": _range(-1),
    "task.segment.class_weights": _range(0), "task.segment.slide_crop": _SOME, "task.segment.slide_stride": _SOME,
    "task.segment.scales": _POSITIVE, "task.segment.pictures": _COUNT,
    "task.moby.temperature": _POSITIVE, "task.moby.queue": _SOME, "task.moby.hidden_dim": _SOME,
    "task.moby.num_features": _SOME,
    "optim.lr": _COUNT, "optim.lr_reference_batch": _COUNT, "optim.warmup_lr": _COUNT, "optim.min_lr": _COUNT,
    "optim.weight_decay": _COUNT, "optim.betas": _BELOW_ONE, "optim.eps": _POSITIVE, "optim.momentum": _BELOW_ONE,
    "optim.clip_norm": _COUNT, "optim.epochs": _POSITIVE, "optim.start_epoch": _COUNT, "optim.warmup_epochs": _COUNT,
    "optim.decay_epochs": _POSITIVE, "optim.decay_rate": _POSITIVE, "optim.milestones": _COUNT,
    "optim.layer_decay": _POSITIVE, "optim.ema": _BELOW_ONE,
    "parallel.expert": _COUNT, "parallel.expert_shard": _COUNT, "parallel.zero": _range(0, 3),
    "engine.timeout": _POSITIVE, "engine.threads": _range(0, MOST_THREADS),
    "checkpoint.every": _COUNT, "checkpoint.every_epochs": _POSITIVE, "checkpoint.keep": _COUNT,
    "checkpoint.file_size": _SOME, "log.every": _SOME, "log.eval_every": _COUNT, "debug.check_replicas": _COUNT,
}  # fmt: skip


def check_ranges(section: Any, prefix: str) -> None:
    """Raises ValueError for a number of a section that is out of its range, not finite, or no number."""
    for f in fields(section):
        key, value = f"{prefix}.{f.name}", getattr(section, f.name)
        if key not in RANGES or value is None and "None" in str(f.type):
            continue
        holds, words = RANGES[key]
        for number in _leaves(value):
            known = isinstance(number, Integral) or math.isfinite(number)
            check(known, key, value, f"a finite number {words}".rstrip())
            check(holds(number), key, value, words)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


_PART_BYTES = 255  # NAME_MAX of Linux's file systems


def check_run(run: Any) -> None:
    """Raises ValueError for a run directory that lies outside of run.output, or is that folder itself."""
    for key, text in (("run.name", run.name), ("run.output", run.output)):
        check(bool(text.strip()) and "\0" not in text, key, text, "a name without NUL, and not empty")
        short = all(len(part.encode(errors="surrogatepass")) <= _PART_BYTES for part in PurePath(text).parts)
        check(short, key, text, f"of parts of at most {_PART_BYTES} bytes, as file systems take them")
    parts = PurePath(run.name).parts
    inside = ".." not in parts and not PurePath(run.name).is_absolute() and run.name.strip(". /") != ""
    check(inside, "run.name", run.name, "a folder below run.output: no '..', no absolute path")

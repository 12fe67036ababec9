"""How options are refused, and which options contradict each other. Plain data; config.py is the schema."""

from dataclasses import fields
from typing import Any, Literal, get_args


def check(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raises ValueError with key, value and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"{key} must be {allowed}, got {value!r}")


def check_choices(section: object, prefix: str) -> None:
    """Raises ValueError for a Literal field whose value is not one of its choices."""
    for f in fields(section):
        choices = get_args(f.type) if getattr(f.type, "__origin__", None) is Literal else ()
        if choices and getattr(section, f.name) not in choices:
            allowed = "one of " + ", ".join(map(str, choices))
            check(False, f"{prefix}.{f.name}", getattr(section, f.name), allowed)


# (option, its value, other option, values of that which go with it, why).
EXCLUSIONS: tuple[tuple[str, Any, str, tuple, str], ...] = (
    ("scores", "sigmoid", "balance_loss", ("gshard", "none"), "load_importance is about the noise of softmax logits"),
    ("choice", "expert", "balance_loss", ("none",), "every expert takes as many tokens as the others"),
    ("choice", "expert", "normalize_gate", (False,), "a token may have any number of experts"),
    ("choice", "expert", "group_limit", (0,), "it limits the experts that a token chooses"),
    ("choice", "expert", "bias_rate", (0.0,), "loads are even by construction"),
    ("choice", "soft", "balance_loss", ("none",), "every expert gets its slots filled"),
    ("choice", "soft", "scores", ("softmax",), "its weights are means"),
    ("choice", "soft", "normalize_gate", (False,), "its weights sum to 1 already"),
    ("choice", "soft", "group_limit", (0,), "a token uses all experts"),
    ("choice", "soft", "bias_rate", (0.0,), "nothing is chosen"),
    ("choice", "soft", "top_k", (1,), "nothing is chosen; model.moe.slots sets the cost"),
    ("choice", "token", "slots", (1,), "slots belong to model.moe.choice=soft"),
    ("choice", "expert", "slots", (1,), "slots belong to model.moe.choice=soft"),
    ("scores", "softmax", "bias_rate", (0.0,), "the bias is added to model.moe.scores=sigmoid"),
    ("balance_loss", "none", "balance_scope", ("group",), "there is no loss to balance by"),
)


def check_routing(moe: Any) -> None:
    """Raises ValueError where routing options of a MoEConfig are out of range or contradict each other."""
    for option, value, other, allowed, why in EXCLUSIONS:
        if getattr(moe, option) == value:
            words = " or ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in allowed)
            reason = f"{words} with model.moe.{option}={value} ({why})"
            check(getattr(moe, other) in allowed, f"model.moe.{other}", getattr(moe, other), reason)
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
    if moe.choice == "expert":
        needs = "with model.moe.choice=expert (an expert that chooses has no need to go by)"
        check(moe.capacity_factor > 0, "model.moe.capacity_factor", moe.capacity_factor, f"> 0 {needs}")
        allowed = f">= 0 {needs}; 0 = model.moe.capacity_factor"
        check(moe.eval_factor >= 0, "model.moe.eval_capacity_factor", moe.eval_capacity_factor, allowed)


def check_task(config: Any, *, forwards: int) -> None:
    """Raises ValueError where a Config's task does not fit its other sections. forwards: Of one optimizer step."""
    check_freeze(config)
    if config.task.name == "simmim":
        check_masks(config)
    if config.task.name == "distill":
        check_teacher(config.task)
    if config.task.name == "moby":
        allowed = "all images of a rank at once with task.name=moby, whose batch norm sees one forward"
        check(forwards == 1, "data.micro_batch", config.data.micro_batch, allowed)
        resampling = config.data.interpolation
        check(resampling != "random", "data.interpolation", resampling, "bicubic or bilinear with task.name=moby")
        allowed = "0 with task.name=moby, which has several forwards a step"
        check(config.model.moe.bias_rate == 0, "model.moe.bias_rate", config.model.moe.bias_rate, allowed)


def check_freeze(config: Any) -> None:
    """Raises ValueError where optim.freeze has nothing to freeze, or nothing is left to train."""
    freeze, has_experts = config.optim.freeze, config.model.moe.has_blocks
    if freeze in ("experts", "moe"):
        check(has_experts, "optim.freeze", freeze, "none or backbone for a model without MoE blocks")
    if freeze == "backbone":
        with_head = config.task.name == "classify" and config.model.num_classes > 0
        check(with_head, "optim.freeze", freeze, "none, experts or moe without a class head to train")


def check_masks(config: Any) -> None:
    """Raises ValueError where an image cannot be cut into mask units of whole patches, or into tokens."""
    model, unit = config.model, config.task.mask_patch_size
    height, width = model.patch_size
    check(height == width, "model.patch_size", model.patch_size, "square with task.name=simmim")
    check(unit % height == 0, "task.mask_patch_size", unit, f"a multiple of model.patch_size={height}")
    stride = height * 2 ** (len(model.depths) - 1)
    for size, why in ((unit, "task.mask_patch_size"), (stride, "pixels that a token of the last stage stands for")):
        whole = all(side % size == 0 for side in model.img_size)
        check(whole, "model.img_size", model.img_size, f"multiples of {size} ({why}) with task.name=simmim")


def check_teacher(task: Any) -> None:
    """Raises ValueError where it is not said who teaches, or a teacher cannot be sharded."""
    check(bool(task.teacher), "task.teacher", task.teacher, "set with task.name=distill")
    named = bool(task.teacher_model) or not task.teacher.endswith((".pth", ".pt"))
    check(named, "task.teacher_model", task.teacher_model, f"a config or timm:NAME with task.teacher={task.teacher}")
    ours = not task.teacher_model.startswith("timm:")
    check(ours or not task.teacher_shard, "task.teacher_shard", task.teacher_shard, "false for a teacher of timm's")

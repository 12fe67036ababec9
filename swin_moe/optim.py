"""Parameter groups, learning-rate schedules by optimizer step, and the optimizers themselves."""

import bisect
import inspect
import math
from dataclasses import dataclass

import torch

from swin_moe.config import OptimConfig
from swin_moe.models.network import Network
from swin_moe.moe import MoELayer
from swin_moe.names.official import file_key, is_wrapped

_MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")  # with torch._disable_dynamo


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the optimizer step t = 0, 1, ...

    The formulas of timm 0.4.12's schedulers as the official lr_scheduler.py sets them up (microsoft/Swin-Transformer);
    poly is that of the official segmentation configs.
    All quantities in steps; learning rates are already scaled to the global batch.
    """

    name: str
    lr: float
    warmup_lr: float
    min_lr: float
    total: int
    warmup: int
    warmup_prefix: bool = True
    decay_steps: int = 0
    decay_rate: float = 0.1
    milestones: tuple[int, ...] = ()
    delay: int = 0  # steps that the rate lags behind; 1: update u has lr(max(u - 1, 0)), as in the official loop

    def __call__(self, t: int, scale: float = 1.0) -> float:
        """Returns the learning rate of step t for a group whose peak is lr x scale.

        warmup_lr and min_lr are absolute for all groups, as in the official layer decay.
        """
        peak = self.lr * scale
        t = max(t - self.delay, 0)
        if self.name == "poly":
            # Straight down to min_lr, the warm-up a factor of that (mmcv's PolyLrUpdaterHook of power 1).
            warm = 1 - t / self.warmup if t < self.warmup else 0.0
            falling = (peak - self.min_lr) * max(1 - t / self.total, 0.0) + self.min_lr
            return falling * (1 - warm * (1 - self.warmup_lr / self.lr if self.lr else 0.0))
        if t < self.warmup:
            return self.warmup_lr + t * (peak - self.warmup_lr) / self.warmup
        if self.name == "cosine":
            start = self.warmup if self.warmup_prefix else 0
            if t - start >= self.total - start:
                return self.min_lr
            angle = math.pi * (t - start) / (self.total - start)
            return self.min_lr + 0.5 * (peak - self.min_lr) * (1 + math.cos(angle))
        if self.name == "linear":  # down to 1 % of the peak
            return peak * (1 - 0.99 * (t - self.warmup) / max(1, self.total - self.warmup))
        if self.name == "step":
            return peak * self.decay_rate ** (t // self.decay_steps)
        return peak * self.decay_rate ** bisect.bisect_right(self.milestones, t)


def build_schedule(config: OptimConfig, *, steps_per_epoch: int, global_batch: int, delay: int = 0) -> Schedule:
    """Returns the schedule of a run.

    delay: 1 with compat.official. The default is 0: the first update has warmup_lr and the second the next one, as the
        formulas say, not warmup_lr twice.

    Raises:
        ValueError: A multistep milestone lies inside the warm-up.
    """
    scale = global_batch / config.lr_reference_batch if config.lr_reference_batch else 1.0
    milestones = tuple(int(m * steps_per_epoch) for m in config.milestones)
    warmup = int(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "multistep" and (not milestones or warmup > min(milestones)):
        raise ValueError(
            f"optim.milestones must be set and not lie inside the warm-up of {config.warmup_epochs} epochs, "
            f"got {config.milestones}"
        )
    return Schedule(
        name=config.schedule,
        lr=config.lr * scale,
        warmup_lr=config.warmup_lr * scale,
        min_lr=config.min_lr * scale,
        total=max(1, int(config.epochs * steps_per_epoch)),
        warmup=warmup,
        warmup_prefix=config.warmup_prefix,
        decay_steps=max(1, int(config.decay_epochs * steps_per_epoch)),
        decay_rate=config.decay_rate,
        milestones=milestones,
        delay=delay,
    )


def has_decay(
    name: str, parameter: torch.Tensor, names: set[str], keywords: set[str], *, vectors: bool = False
) -> bool:
    """Returns whether weight decay applies: not to vectors, biases, and what the model excludes by name or keyword.

    The rule of the official optimizer.py:set_weight_decay. Keywords are searched in the whole name, so that a wrapper
    prefix such as "encoder." cannot switch the exclusion off (it does in the official SimMIM code).

    vectors: To vectors and biases too, as the official detectors and segmentors have it.
    """
    excluded = name in names or any(name.endswith("." + n) for n in names) or any(k in name for k in keywords)
    plain = vectors or not (parameter.ndim <= 1 or name.endswith(".bias"))
    return plain and not excluded


def frozen_parameters(model: Network, freeze: str) -> set[str]:
    """Returns the names of what optim.freeze keeps as it is.

    experts: the experts of MoE layers, routers go on. moe: whole MoE layers, as the Tutel paper (arXiv:2206.03382)
    found better for fine-tuning on detection. backbone: all but the class head, a linear probe.

    Raises:
        ValueError: Nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    if freeze == "backbone":
        head = model.head_parameters()
        if not head:
            raise ValueError(f"optim.freeze=backbone needs a class head to train, {type(model).__name__} has none")
        return set(names) - head
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, MoELayer))
    if freeze == "moe":
        return {name for name in names if name.startswith(layers)}
    return {name for name in names if freeze == "experts" and ".experts." in f".{name}"}


def layer_id(name: str, depths: tuple[int, ...]) -> int:
    """Returns the depth of a parameter for layer decay, 0 for the embedding to sum(depths) + 1 for norm and head.

    As optimizer.py:get_swin_layer of the official repository; a downsample counts with the last block before it, and
    absolute_pos_embed, which that does not name, with norm and head.
    """
    parts = name.removeprefix("encoder.").split(".")
    if parts[0] in ("patch_embed", "mask_token"):
        return 0
    if parts[0] == "layers":
        stage = int(parts[1])
        if parts[2] == "blocks":
            return sum(depths[:stage]) + int(parts[3]) + 1
        return sum(depths[: stage + 1])
    return sum(depths) + 1


def parameter_groups(model: Network, config: OptimConfig, depths: tuple[int, ...]) -> list[dict]:
    """Returns optimizer groups {"params", "names", "weight_decay", "lr_scale"} over all trainable parameters.

    Without layer decay: one group with and one without weight decay, empty ones left out.
    """
    names, keywords = set(model.no_weight_decay()), set(model.no_weight_decay_keywords())
    groups: dict[tuple[int, bool], dict] = {}
    last = sum(depths) + 1
    wrapped = is_wrapped(name for name, _ in model.named_parameters())
    vectors = getattr(model, "vectors_decay", False)  # a network from elsewhere may not derive from Network
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = layer_id(file_key(name, wrapped=wrapped), depths) if config.layer_decay != 1.0 else last
        decay = has_decay(name, parameter, names, keywords, vectors=vectors)
        group = groups.setdefault(
            (depth, decay),
            {
                "params": [],
                "names": [],
                "weight_decay": config.weight_decay if decay else 0.0,
                "lr_scale": config.layer_decay ** (last - depth),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(config: OptimConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """Returns the optimizer over `parameter_groups`; its learning rates are set every step by the engine."""
    kind, options = optimizer_class(config)
    return without_compiler(kind)(groups, **options)


def without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Returns a class of the same name and arithmetic whose steps do not import torch._dynamo.

    torch marks these methods as not to be traced, for who compiles a step, and imports the compiler at the first call:
    1.1 of the 4.3 CPU seconds, and 60 MB, of every rank of a short run.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in _MARKED}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def optimizer_class(config: OptimConfig) -> tuple[type[torch.optim.Optimizer], dict]:
    """Returns (class, its options), for wrappers that construct the optimizer themselves."""
    # fused: one pass over the memory of all tensors, on CPU as on CUDA, and no temporaries; several times faster for
    # many small tensors.
    if config.name == "sgd":
        momentum = {"momentum": config.momentum, "nesterov": config.momentum > 0}
        return torch.optim.SGD, {"lr": config.lr, **momentum, "fused": True}
    return torch.optim.AdamW, {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}

"""The options of tasks: one dataclass each, with what it checks against the rest of a config. Plain data, no torch.

A task of this repository has a section of TaskConfig (task.simmim.mask_ratio), a task from elsewhere its `Options`
under task.own. All options stood beside task.name once (task.mask_ratio): MOVED says where they are now, and files,
words and keywords of Python that know the old places are still read.
"""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from swin_moe.config.checks import NOT_STATE, check, check_choices, shown
from swin_moe.config.options.detect_options import DetectOptions, SoftTeacherOptions
from swin_moe.config.options.task_options import TaskOptions
from swin_moe.registry import is_outside, lookup


@dataclass(frozen=True)
class ClassifyOptions(TaskOptions):
    section = "classify"
    classifies = True
    label_smoothing: float = 0.1
    mixup: float = 0.8  # alpha of the Beta distribution; 0 = off
    cutmix: float = 1.0
    mix_prob: float = 1.0  # of mixing at all
    mix_switch_prob: float = 0.5  # of cutmix, where both are on

    def check(self, config: Any, *, forwards: int) -> None:
        """Raises ValueError for a network without classes."""
        classes = config.model.num_classes
        check(classes >= 1, "model.num_classes", classes, f">= 1 with task.name={config.task.name}")


@dataclass(frozen=True)
class SimMIMOptions(TaskOptions):
    section = "simmim"
    mask_patch_size: int = 32  # pixels per side of what is hidden or seen together
    mask_ratio: float = 0.6  # hidden share of an image
    target_window: int = 0  # odd; pixels per side that targets are normalized over (SwinV2: 47); 0 = raw
    # Validation images whose reconstruction is drawn at every evaluation.
    pictures: int = field(default=4, metadata=NOT_STATE)

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = self.target_window == 0 or (self.target_window > 1 and self.target_window % 2 == 1)
        check(odd, "task.simmim.target_window", self.target_window, "odd and > 1, or 0 for raw pixels")

    def check(self, config: Any, *, forwards: int) -> None:
        """Raises ValueError where an image cannot be cut into mask units of whole patches, or into tokens."""
        model, unit, key = config.model, self.mask_patch_size, "task.simmim.mask_patch_size"
        height, width = model.patch_size
        check(height == width, "model.patch_size", model.patch_size, "square with task.name=simmim")
        check(unit % height == 0, key, unit, f"a multiple of model.patch_size={height}")
        stride = height * 2 ** (len(model.depths) - 1)
        for size, why in ((unit, key), (stride, "pixels that a token of the last stage stands for")):
            whole = all(side % size == 0 for side in model.img_size)
            check(whole, "model.img_size", model.img_size, f"multiples of {size} ({why}) with task.name=simmim")


@dataclass(frozen=True)
class DistillOptions(TaskOptions):
    section = "distill"
    # Weights: a checkpoint of any task, an official .pth file, or one of timm's.
    teacher: str = field(default="", metadata=NOT_STATE)
    teacher_model: str = ""  # config of the teacher in an official file, or timm:NAME; "" = as teacher tells
    teacher_precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"  # of its weights and arithmetic
    # Its weights are cut over the ranks, and whole one block at a time.
    teacher_shard: bool = field(default=False, metadata=NOT_STATE)
    smooth_l1_beta: float = 2.0  # errors below it count squared

    def check(self, config: Any, *, forwards: int) -> None:
        """Raises ValueError where it is not said who teaches, or a teacher cannot be sharded."""
        teacher, model = self.teacher, self.teacher_model
        check(bool(teacher), "task.distill.teacher", teacher, "set with task.name=distill")
        named = bool(model) or not teacher.endswith((".pth", ".pt"))
        allowed = f"a config or timm:NAME with task.distill.teacher={teacher}"
        check(named, "task.distill.teacher_model", model, allowed)
        whole = not (model.startswith("timm:") and self.teacher_shard)
        check(whole, "task.distill.teacher_shard", self.teacher_shard, "false for a teacher of timm's")


@dataclass(frozen=True)
class MoBYOptions(TaskOptions):
    section = "moby"
    momentum: float = 0.99  # of the moving average at the first step; a cosine brings it to 1
    temperature: float = 0.2  # that similarities are divided by
    queue: int = 4096  # keys of earlier images that each of the two queues holds
    hidden_dim: int = 4096  # hidden channels of projector and predictor
    num_features: int = 256  # channels of what is compared

    def check(self, config: Any, *, forwards: int) -> None:
        """Raises ValueError where the images of a step are not all seen by one forward of each view."""
        allowed = "all images of a rank at once with task.name=moby, whose batch norm sees one forward"
        check(forwards == 1, "data.micro_batch", config.data.micro_batch, allowed)
        resampling = config.data.interpolation
        check(resampling != "random", "data.interpolation", resampling, "bicubic or bilinear with task.name=moby")
        allowed = "0 with task.name=moby, which has several forwards a step"
        check(config.model.moe.bias_rate == 0, "model.moe.bias_rate", config.model.moe.bias_rate, allowed)


@dataclass(frozen=True)
class SegmentOptions(TaskOptions):
    section = "segment"
    any_size = True
    channels: int = 512  # of everything in the decode head
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)  # sides of the grids that the last map is pooled to
    dropout: float = 0.1  # probability that a channel of an image is dropped before the class layers
    auxiliary_channels: int = 256  # of the second head, which training alone has; 0 = none
    auxiliary_index: int = 2  # which map it reads
    auxiliary_weight: float = 0.4  # of its loss
    frozen_stages: int = -1  # -1 = none; 0 = patch embedding and positions; n = also the first n stages
    norm: Literal["batch", "frozen"] = "batch"  # statistics of a step's pixels on all ranks, or the running ones
    class_weights: tuple[float, ...] = ()  # that pixels' losses are multiplied by; () = 1
    inference: Literal["whole", "slide"] = "whole"  # images at once, or crops of slide_crop every slide_stride
    slide_crop: tuple[int, int] = (512, 512)  # height, width
    slide_stride: tuple[int, int] = (341, 341)
    scales: tuple[float, ...] = (1.0,)  # sizes of an image that probabilities are averaged over, times its own
    flip: bool = False  # the mirrored image counts too
    pictures: int = field(default=4, metadata=NOT_STATE)  # validation images drawn at every evaluation

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.scales) > 0, "task.segment.scales", self.scales, "one number or more")
        for name in ("slide_crop", "slide_stride"):
            check(min(getattr(self, name)) > 0, f"task.segment.{name}", getattr(self, name), "> 0")
        within = all(stride <= crop for stride, crop in zip(self.slide_stride, self.slide_crop))
        check(within, "task.segment.slide_stride", self.slide_stride, f"at most slide_crop={self.slide_crop}")

    def check(self, config: Any, *, forwards: int) -> None:
        """Raises ValueError for a network without classes, and where batch norm would not see a step's images."""
        classes, stages = config.model.num_classes, len(config.model.depths)
        check(classes >= 1, "model.num_classes", classes, f">= 1 with task.name={config.task.name}")
        known = not self.class_weights or len(self.class_weights) == classes
        check(known, "task.segment.class_weights", self.class_weights, f"one for each of {classes} classes")
        inside = self.auxiliary_index < stages
        check(inside, "task.segment.auxiliary_index", self.auxiliary_index, f"below the {stages} stages")
        check(self.frozen_stages <= stages, "task.segment.frozen_stages", self.frozen_stages, f"at most {stages}")
        seen = forwards == 1 or self.norm == "frozen"
        allowed = "all images of a rank at once, as batch norm sees one forward, or task.segment.norm=frozen"
        check(seen, "data.micro_batch", config.data.micro_batch, allowed)


# Options that stood beside task.name once -> their section. What comes new has one place only.
MOVED = {
    **dict.fromkeys(("label_smoothing", "mixup", "cutmix", "mix_prob", "mix_switch_prob"), "classify"),
    **dict.fromkeys(("mask_patch_size", "mask_ratio", "target_window", "pictures"), "simmim"),
    **dict.fromkeys(("teacher", "teacher_model", "teacher_precision", "teacher_shard", "smooth_l1_beta"), "distill"),
    **dict.fromkeys(("momentum", "temperature", "queue", "hidden_dim", "num_features"), "moby"),
}


@dataclass(frozen=True, init=False)
class TaskConfig:
    name: str = "classify"
    classify: ClassifyOptions = field(default_factory=ClassifyOptions)
    simmim: SimMIMOptions = field(default_factory=SimMIMOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    moby: MoBYOptions = field(default_factory=MoBYOptions)
    detect: DetectOptions = field(default_factory=DetectOptions)
    segment: SegmentOptions = field(default_factory=SegmentOptions)
    soft_teacher: SoftTeacherOptions = field(default_factory=SoftTeacherOptions)
    own: TaskOptions = field(default_factory=TaskOptions)  # of a task.name=package.module:Name, its class's `Options`

    def __init__(self, name: str = "classify", **given: Any) -> None:
        """Takes the fields, and single options by the names of MOVED, which change a section: TaskConfig(mixup=0.0)."""
        moved = {key: given.pop(key) for key in MOVED if key in given}
        values = {"name": name, "own": TaskOptions()} | {key: kind() for key, kind in SECTIONS.items()}
        if unknown := given.keys() - values.keys():
            raise TypeError(f"TaskConfig has no option {', '.join(sorted(unknown))}")
        for key, value in (values | given).items():
            object.__setattr__(self, key, value)
        check_choices(self, "task")
        for key, value in moved.items():
            object.__setattr__(self, MOVED[key], replace(getattr(self, MOVED[key]), **{key: value}))

    if not TYPE_CHECKING:  # a misspelt option stays an error of types

        def __getattr__(self, key: str) -> Any:
            """Returns an option of a section by its old name."""
            if key not in MOVED:
                raise AttributeError(f"TaskConfig has no option {key}")
            return getattr(getattr(self, MOVED[key]), key)

    @property
    def options(self) -> TaskOptions:
        """Those of the task that task.name says."""
        return getattr(self, self.name) if self.name in SECTIONS else self.own


# Section -> its dataclass: a field of TaskConfig is all that a new one needs.
_KINDS: dict[str, Any] = {entry.name: entry.default_factory for entry in fields(TaskConfig)}
SECTIONS: dict[str, type[TaskOptions]] = {
    name: kind for name, kind in _KINDS.items() if isinstance(kind, type) and kind is not TaskOptions
}


def own_options(name: str, *, needed: bool) -> type[TaskOptions]:
    """Returns the dataclass of what stands under task.own: the `Options` of a task from elsewhere, which is imported.

    Args:
        needed: Some are given. Else a task that is not there has none: who builds it says so, and who does not needs
            the rest of the config only.

    Raises:
        ValueError: There is no such task, or its Options are no dataclass of this kind.
    """
    if not is_outside(name):
        return TaskOptions
    try:
        found = getattr(lookup({}, name, key="task.name"), "Options", TaskOptions)
    except ValueError:
        if needed:
            raise
        return TaskOptions
    if not (isinstance(found, type) and issubclass(found, TaskOptions) and is_dataclass(found)):
        wanted = "a dataclass derived from TaskOptions (swin_moe/config/tasks.py)"
        raise ValueError(f"task.name={name}: its Options must be {wanted}, got {shown(found)}")
    return found


def moved_key(key: str) -> str:
    """Returns where an option stands now: task.mask_ratio is task.simmim.mask_ratio; other keys are as they were."""
    section, _, leaf = key.partition(".")
    return f"task.{MOVED[leaf]}.{leaf}" if section == "task" and leaf in MOVED else key


def nested(tree: dict, *, source: str) -> dict:
    """Returns the tree of a config with the options of tasks in their sections, wherever they stood.

    Raises:
        ValueError: An option stands in both places with different values; names the source.
    """
    task = tree.get("task")
    if not isinstance(task, dict) or not MOVED.keys() & task.keys():
        return tree
    result = {key: value for key, value in task.items() if key not in MOVED}
    for key, value in task.items():
        if key in MOVED:
            section = result.get(MOVED[key], {})
            if not isinstance(section, dict):
                continue  # refused where it is read: a section of keys
            if section.get(key, value) != value:
                raise ValueError(said_twice(moved_key(f"task.{key}"), value, section[key], source=source))
            result[MOVED[key]] = {**section, key: value}
    return {**tree, "task": result}


def said_twice(key: str, old: object, new: object, *, source: str) -> str:
    """Returns the sentence about an option that has one value under its old name and another under its `key`."""
    words = f"task.{key.rpartition('.')[2]}={shown(old)} and {key}={shown(new)}"
    return f"{source}: {words} are one option; leave out the first, which is its old name"

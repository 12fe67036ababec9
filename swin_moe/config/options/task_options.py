"""What the options of every task derive from. Plain data, no torch."""

from dataclasses import dataclass
from typing import Any

from swin_moe.config.checks import check_choices


@dataclass(frozen=True)
class TaskOptions:
    """What the options of a task derive from; as it is, those of a task that has none."""

    section = "own"  # of TaskConfig
    classifies = False  # the network's outputs are the data's classes, by a head
    learns_unlabelled = False  # images without labels are mixed with those that have some
    any_size = False  # images keep their sizes; model.img_size is only what positions belong to

    def __post_init__(self) -> None:
        check_choices(self, f"task.{self.section}")

    def check(self, config: Any, *, forwards: int) -> None:
        """Raises ValueError where the Config's other sections do not fit this task, before anything is built.

        forwards: Of one optimizer step.
        """

"""What tells one network of the family from another (model.name): plain data, one row each, for models and tools."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """What tells one family from another."""

    mixer: Literal["window", "mlp"]
    bias: Literal["table", "log_cpb", "none"]
    bias_sigmoid: bool  # 16 * sigmoid of the bias network's output
    scores: Literal["dot", "cosine", "none"]
    norm: Literal["pre", "post"]  # norm before each branch, or of its output before the residual sum
    merge_norm: Literal["before", "after"]  # the norm of patch merging and its reduction


VARIANTS = {
    "swin": Variant("window", "table", False, "dot", "pre", "before"),
    "swinv2": Variant("window", "log_cpb", True, "cosine", "post", "after"),
    "swin_mlp": Variant("mlp", "none", False, "none", "pre", "before"),
    "swin_moe": Variant("window", "log_cpb", False, "dot", "pre", "before"),
}

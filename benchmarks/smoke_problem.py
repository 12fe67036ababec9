"""What a case of gpu_smoke.py is: tensors, a kernel, and plain PyTorch operators that compute the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """Tensors, the kernel, and what it is compared with."""

    tensors: Mapping[str, Tensor | None]
    ours: Function
    plain: Function  # PyTorch's operators; in float64 they are the truth, in the tensors' dtype the error allowed
    gradients: bool = True  # also of every floating-point tensor
    tolerance: float | None = None  # set: ours and plain differ relatively by no more, and nothing is run in float64
    fill: bool = False  # memory is full of nan before ours runs and of zeros before plain


@dataclass(frozen=True)
class Case:
    """One line of the report."""

    name: str
    make: Callable[[torch.device, str], Problem]


def draw(device: torch.device, dtype: torch.dtype, *size: int, seed: int = 0) -> Tensor:
    """Returns normal numbers, the same on every device."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

"""What a child breaks before its cases (Runner.run_cases), to see that the fuzz finds it."""

import os
import time

from swin_moe.config import checks, coerce
from tests.fuzz import children
from tests.fuzz.cases import Case


def accept_everything() -> None:
    """Checks of options let every value through."""
    checks._fits = lambda value, kind: True  # type: ignore[assignment]
    coerce._coerce = lambda value, kind: value  # type: ignore[assignment]


def end_and_hang() -> None:
    """The third case ends its process, the fifth hangs."""
    ends = {3: lambda: os._exit(0), 5: lambda: time.sleep(60)}
    children.draw_case = lambda seed, number, *_: Case(  # type: ignore[assignment]
        "f", "python", "f()", (), call=ends.get(number, tuple)
    )


def take_memory() -> None:
    """Every case asks for twice the memory that there is."""
    children.draw_case = lambda *_: Case(  # type: ignore[assignment]
        "f", "python", "f()", (), call=lambda: bytearray(2 * children.MEMORY)
    )


def loop_in_parallel() -> None:
    """Every case runs a parallel loop of two threads."""
    import torch

    def call() -> None:
        torch.set_num_threads(2)
        torch.ones(1 << 20).add_(1)

    children.draw_case = lambda *_: Case("f", "python", "f()", (), call=call)  # type: ignore[assignment]

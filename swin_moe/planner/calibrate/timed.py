"""Times every operator that starts a kernel where it stands, with its work as the planner counts it."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe.planner.operators import starts_kernel, tensors_of, work_of


class Timed(TorchDispatchMode):
    """Within it operators are noted in order: (name, precision), row of work (operators.py) and seconds of each.

    Args:
        now: A clock (machine.py).
    """

    def __init__(self, now: Any) -> None:
        super().__init__()
        self.now = now
        self.operators: list[tuple[str, str]] = []
        self.work: list[list[float]] = []
        self.seconds: list[float] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and notes what it was and took."""
        name = function.overloadpacket.__name__
        start = self.now()
        result = function(*args, **(kwargs or {}))
        taken = self.now() - start
        if starts_kernel(function, name):
            precision, work = work_of(name, args, list(tensors_of(result)))
            self.operators.append((name, precision))
            self.work.append(work)
            self.seconds.append(taken)
        return result

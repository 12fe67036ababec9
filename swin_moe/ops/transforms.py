"""Our operators and autograd functions under torch.func.grad, vjp and jacrev, which need another form of both.

torch.func wants `setup_context` apart from `forward`, and of torch.library's operators that have a gradient nothing at
all. Both are wrapped when a transform differentiates; otherwise they are called as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_DIFFERENTIATES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def differentiated() -> bool:
    """Returns whether a transform of torch.func differentiates what is computed now."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(level.key() in _DIFFERENTIATES for level in torch._C._functorch.get_interpreter_stack())


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Returns `function.apply(*arguments)`, also of a function without `setup_context` where it is differentiated."""
    if not differentiated():
        return function.apply(*arguments)
    call = _Call(function, arguments)
    results = _Wrapped.apply(call, *call.flatten(arguments))[: call.num_outputs]
    return results[0] if call.is_single else results


def call_operator(operator: Callable, gradient: Callable, save: Callable, *arguments: Any) -> Any:
    """Returns `operator(*arguments)`.

    Args:
        gradient, save: What torch.library.register_autograd got for it.
    """
    if not differentiated():
        return operator(*arguments)
    return _function_of(operator, gradient, save).apply(*arguments)


@functools.cache
def _function_of(operator: Callable, gradient: Callable, save: Callable) -> type[torch.autograd.Function]:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return tuple(_final(lambda: gradient(ctx, *grads), (*grads, *ctx.saved_tensors)))

    parts = {"forward": operator, "setup_context": save, "backward": backward}
    return type("Operator", (torch.autograd.Function,), {name: staticmethod(part) for name, part in parts.items()})


class _Context:
    """What a forward of the old form writes to, and its backward reads."""

    def __init__(self) -> None:
        self.saved_tensors: Sequence[Tensor | None] = ()
        self.constant: tuple[Tensor, ...] = ()  # outputs without a gradient
        self.materializes = True
        self.needs_input_grad: Sequence[bool] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materializes = value


class _Call:
    """One call of a function of the old form: its context, and how its arguments and results are laid out flat.

    Transforms see tensors only among flat arguments, so dataclasses of them are taken apart.
    """

    def __init__(self, function: type[torch.autograd.Function], arguments: Sequence[Any]) -> None:
        self.function, self.context = function, _Context()
        self.layout: list[tuple[Callable[..., Any] | None, int]] = [
            (type(a), len(_fields(a))) if dataclasses.is_dataclass(a) else (None, 1) for a in arguments
        ]
        self.num_outputs, self.is_single = 0, False
        self.places: list[tuple[str, int] | None] = []  # of each saved tensor: among "inputs" or "outputs"; None = None

    @staticmethod
    def flatten(arguments: Sequence[Any]) -> list[Any]:
        return [leaf for a in arguments for leaf in (_fields(a) if dataclasses.is_dataclass(a) else (a,))]

    def forward(self, leaves: Sequence[Any]) -> tuple[Tensor, ...]:
        """Returns the function's outputs, and then what it saved beside inputs and outputs."""
        rest, arguments = list(leaves), []
        for kind, count in self.layout:
            taken, rest = rest[:count], rest[count:]
            arguments.append(kind(*taken) if kind else taken[0])
        result = self.function.forward(self.context, *arguments)
        self.is_single = isinstance(result, Tensor)
        outputs = [result] if self.is_single else list(result)
        self.num_outputs = len(outputs)
        self.constant = [i for i, out in enumerate(outputs) if any(out is one for one in self.context.constant)]
        self.places = []
        for tensor in self.context.saved_tensors:
            self.places.append(None if tensor is None else _place(tensor, inputs=leaves, outputs=outputs))
            if tensor is not None and self.places[-1] is None:
                outputs.append(tensor)
                self.places[-1] = ("outputs", len(outputs) - 1)
        self.context.saved_tensors = self.context.constant = ()
        return tuple(outputs)

    def backward(self, saved: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list:
        """Returns the gradient of each flat argument."""
        tensors, context = iter(saved), self.context
        context.saved_tensors = [None if place is None else next(tensors) for place in self.places]
        starts = [sum(count for _, count in self.layout[:i]) for i in range(len(self.layout))]
        context.needs_input_grad = [needs[start] for start in starts]
        found = self.function.backward(context, *grads[: self.num_outputs])
        context.saved_tensors = ()
        found = (found,) if isinstance(found, Tensor) else found
        return [leaf for g, (kind, count) in zip(found, self.layout) for leaf in ([None] * count if kind else [g])]


class _Wrapped(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *leaves: Any) -> tuple[Tensor, ...]:
        return call.forward(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        call, *leaves = inputs
        held = {"inputs": leaves, "outputs": output}
        ctx.call = call
        ctx.set_materialize_grads(call.context.materializes)
        ctx.save_for_backward(*(held[place[0]][place[1]] for place in call.places if place is not None))
        ctx.mark_non_differentiable(*(output[i] for i in call.constant), *output[call.num_outputs :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        return None, *_final(lambda: ctx.call.backward(saved, needs, grads), (*grads, *saved))


class _Final(torch.autograd.Function):
    """Gradients, and what they depend on: whoever differentiates them again is told that there is no such thing."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("this network has no second derivatives; with model.attention=reference a dense one has")


def _final(gradient: Callable[[], Sequence[Tensor | None]], depends_on: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns what `gradient` returns, computed without a graph; an error is what a second derivative of it gives."""
    with torch.no_grad():
        found = list(gradient())
    places = [i for i, grad in enumerate(found) if grad is not None]
    anchors = [tensor for tensor in depends_on if tensor is not None and tensor.is_floating_point()]
    for place, grad in zip(places, _Final.apply(len(places), *(found[i] for i in places), *anchors)):
        found[place] = grad
    return found


def _fields(value: Any) -> list[Any]:
    return [getattr(value, field.name) for field in dataclasses.fields(value)]


def _place(tensor: Tensor, **groups: Sequence[Any]) -> tuple[str, int] | None:
    return next(((name, i) for name, group in groups.items() for i, one in enumerate(group) if one is tensor), None)

"""Every compiled kernel once, forward and backward: is this build right on this device?

    python benchmarks/gpu_smoke.py [--device cuda] [--size small] [--only "window 16, bf16; draws"] [--calls 10]

One line per case of smoke_cases.py: its worst result by error (of the kernel against float64, relative, and how many
times that of plain PyTorch operators in the same dtype), and the milliseconds of a forward and of forward and backward.
A case is wrong if an error is beyond twice the plain operators' plus a few roundings: tests/ hold them to closer bounds
one by one, this is quick and complete. Operators of the package that no case called are named at the end.

A kernel that breaks the device ends the process's use of it, so the cases after it run in a new process. The exit code
is 1 if any case is wrong. --device cpu runs the CPU's kernels and shows that the script itself works.
"""

import argparse
import subprocess
import sys
import traceback

import torch
from device_clock import seconds_per_call
from smoke_cases import SIZES, cases
from smoke_problem import Case, Function, Problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe.ops import extension

FEW = 64  # a result of fewer numbers is a sum that cancels: plain operators are exact by luck now and then
FLOORS = {torch.float32: 6e-7, torch.bfloat16: 1e-3, torch.float16: 1.2e-4}
RESTARTS = 4


class Called(TorchDispatchMode):
    """Remembers which operators of the package ran."""

    names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204  torch's signature
        if func.namespace == extension.NAMESPACE:
            self.names.add(func.name().removeprefix(f"{extension.NAMESPACE}::").partition(".")[0])
        return func(*args, **(kwargs or {}))


def results(function: Function, problem: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Returns what a function gives, and the gradients of the tensors, by name; `dtype`: of all that is floating."""
    leaves = []
    for tensor in problem.tensors.values():
        leaf = tensor
        if tensor is not None and tensor.is_floating_point():
            leaf = tensor.detach().to(dtype or tensor.dtype).requires_grad_(problem.gradients)
        leaves.append(leaf)
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    found = {f"out {n}" if n else "out": t.detach() for n, t in enumerate(outs)}
    wanted = {name: leaf for name, leaf in zip(problem.tensors, leaves) if leaf is not None and leaf.requires_grad}
    if wanted:
        # Rounded to the dtype of the tensors, so that float64 gets the same.
        grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(7)).to(t.device) for t in outs]
        coarse = next(t.dtype for t in problem.tensors.values() if t is not None)
        grads = [g.to(coarse).to(t.dtype) for g, t in zip(grads, outs)]
        given = torch.autograd.grad(outs, list(wanted.values()), grads, materialize_grads=True)
        found |= {f"grad {name}": grad for name, grad in zip(wanted, given)}
    return found


def fill_memory(device: torch.device, value: float) -> None:
    """Leaves memory full of `value` with the allocator: what a kernel does not write shows."""
    large = [torch.full((16 << 20,), value, device=device) for _ in range(2)]
    small = [torch.full((64 << 10,), value, device=device) for _ in range(16)]
    del large, small


def relative(found: Tensor, exact: Tensor) -> float:
    """Returns |found - exact| / |exact|, Euclidean; nan if anything found is no number."""
    if not exact.numel():
        return 0.0
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def compare(problem: Problem, device: torch.device) -> tuple[bool, str]:
    """Returns (whether every result is right, the worst one in words)."""
    if problem.fill:
        fill_memory(device, float("nan"))
    with Called():
        ours = results(problem.ours, problem)
    if problem.fill:
        fill_memory(device, 0.0)
    plain = results(problem.plain, problem)
    if problem.tolerance is not None:
        errors = {name: relative(ours[name], plain[name]) for name in plain}
        worst = max(errors, key=lambda name: _order(errors[name]))
        return errors[worst] <= problem.tolerance, f"{worst} {errors[worst]:.1e} of {problem.tolerance:.0e}"
    exact = results(problem.plain, problem, torch.float64)
    dtype, lines = next(t.dtype for t in problem.tensors.values() if t is not None), []
    for name, truth in exact.items():
        error, allowed = relative(ours[name], truth), relative(plain[name], truth)
        floor = FLOORS[dtype] if truth.numel() >= FEW else 200 * torch.finfo(dtype).eps
        part = error / (2 * allowed + floor)
        lines.append((_order(part), part <= 1, f"{name} {error:.1e} ({error / max(allowed, 1e-30):.2f}x)"))
    return all(right for _, right, _ in lines), max(lines)[2]


def _order(error: float) -> float:
    return float("inf") if error != error else error


def times(problem: Problem, device: torch.device, calls: int) -> str:
    """Returns the milliseconds of a forward, and of forward and backward where there is one."""
    leaves = [t if t is None else t.detach() for t in problem.tensors.values()]
    with torch.no_grad():
        text = f"forward {1e3 * seconds_per_call(lambda: problem.ours(*leaves), device, calls):.3f} ms"
    if problem.gradients:
        text += f", both {1e3 * seconds_per_call(lambda: results(problem.ours, problem), device, calls):.3f} ms"
    return text


def device_is_lost(device: torch.device) -> bool:
    """Returns whether a kernel has broken the device for this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def run(chosen: list[Case], device: torch.device, size: str, calls: int) -> tuple[list[str], int]:
    """Prints one line per case; returns (names of the wrong ones, number of cases run until the device was lost)."""
    wrong = []
    for number, case in enumerate(chosen, 1):
        print(f"{case.name:<52} ", end="", flush=True)  # first: a kernel that never ends is named
        try:
            problem = case.make(device, size)
            right, text = compare(problem, device)
            if calls:
                text += f"  {times(problem, device, calls)}"
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # whatever a kernel does: the others are to be seen as well
            first = (str(error).splitlines() or [""])[0]
            right, text = False, f"{type(error).__name__}: {first}"
            if not isinstance(error, RuntimeError):
                traceback.print_exc()
        print(f"{'ok   ' if right else 'WRONG'} {text}", flush=True)
        if not right:
            wrong.append(case.name)
            if device_is_lost(device):
                return wrong, number
    return wrong, len(chosen)


def without_a_case(device: torch.device, called: set[str]) -> list[str]:
    """Returns the operators with a kernel for the device that were not called."""
    key, prefix = {"cuda": "CUDA", "cpu": "CPU"}[device.type], f"{extension.NAMESPACE}::"
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    kernels = {
        name.removeprefix(prefix).partition(".")[0]
        for name in names
        if any(torch._C._dispatch_has_kernel_for_dispatch_key(name, k) for k in (key, "CompositeExplicitAutograd"))
    }
    return sorted(kernels - called)


def main() -> int:
    """Runs the cases and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="medium", choices=SIZES)
    parser.add_argument(
        "--only", default="", help="parts of names, comma-separated: 'window 16,fp16'; all words of a part"
    )
    parser.add_argument("--calls", type=int, default=10, help="that are timed; 0 = none")
    parser.add_argument("--skip", type=int, default=0, help="so many cases, which another process ran")
    parser.add_argument("--restarts", type=int, default=RESTARTS, help="after kernels that break the device")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device; --device cpu shows that the script works")
    torch.manual_seed(0)
    wanted = [part.strip() for part in options.only.split(";") if part.strip()]
    chosen = [case for case in cases() if not wanted or any(part in case.name for part in wanted)]
    if not chosen:
        parser.error(f"--only {options.only!r} is in no case; they are named like {cases()[0].name!r}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    kernels = extension.why_not(device.type) or f"compiled kernels {extension.digest()}"
    print(f"{name}, torch {torch.__version__}, {kernels}, {options.size}, {len(chosen) - options.skip} cases")
    wrong, done = run(chosen[options.skip :], device, options.size, options.calls)
    code = 1 if wrong else 0
    print(f"{done} cases, {len(wrong)} wrong" + "".join(f"\nWRONG {n}" for n in wrong), flush=True)
    left = len(chosen) - options.skip - done
    if left and options.restarts:
        print(f"the device is lost to this process: the other {left} cases run in a new one", flush=True)
        again = ["--skip", str(options.skip + done), "--restarts", str(options.restarts - 1)]
        return subprocess.call([sys.executable, __file__, *sys.argv[1:], *again]) or code
    if left:
        print(f"{left} cases were not run: the device was lost too often")
        return 1
    if not wanted and (others := without_a_case(device, Called.names)):
        print(f"operators that no case of this process called: {', '.join(others)}")
    return code


if __name__ == "__main__":
    sys.exit(main())

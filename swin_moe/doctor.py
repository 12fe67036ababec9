"""`swin-moe doctor`: what of this machine and installation is used, and why the rest is not.

Prints one line per part and ends with exit code 1 where something required is broken, else 0. Optional parts that are
missing are said to be missing. Every part is imported when it is looked at, so a broken one hides no other.
Started on many ranks (`swin-moe launch -n 4 -- -m swin_moe.doctor`), rank 0 says that of itself, and all ranks check
each other, the links between them and their hosts (launcher/preflight): 69 where a rank cannot be used.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from swin_moe.config.arguments import command_parser
from swin_moe.usage.texts import EXAMPLES

if TYPE_CHECKING:
    from launcher.env import RankEnv

MARK = {True: "ok", False: "BROKEN", None: "-"}
# Name of a distribution -> what is imported, where they differ.
MODULES = {"PyYAML": "yaml", "scikit-learn": "sklearn", "mpich": ""}
# What most models ask for: window, heads and channels a head of a first stage.
COMMON = {
    "Swin-T, window 7": ((7, 7), 3, 32, False),
    "SwinV2-B, window 8": ((8, 8), 4, 32, True),
    "SwinV2-B, window 16": ((16, 16), 4, 32, True),
    "Swin-B at 384, window 12": ((12, 12), 4, 32, False),
}
WINDOWS = 256  # of a measured case, at most

Line = tuple[bool | None, str, str]  # works (None: optional and absent), part, what was found


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    from launcher.unread import until_unread

    sys.exit(until_unread(lambda: main(argv)))


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where something required is broken; 69 where one of many ranks cannot be used."""
    parser = command_parser("doctor", __doc__.partition("\n\n")[0], EXAMPLES["doctor"])
    parser.add_argument("--no-measure", action="store_true", help="leave out the times of the attention paths")
    try:
        options = parser.parse_args(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        ranks = _ranks()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    broken = 0 if ranks is not None and ranks.rank else _examine(measure=not options.no_measure)
    if ranks is None:
        return broken
    from launcher.preflight.conduct import Settings
    from launcher.preflight.rank import on_ranks

    try:
        return on_ranks(ranks, Settings(), otherwise=broken)[0]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _ranks() -> "RankEnv | None":
    """Returns who this process is among the ranks it was started with; None = it is alone, or under torchrun, which
    keeps the port where ranks meet. Raises ValueError where the ranks do not meet."""
    from launcher import env, mpi

    alone = env.detect(os.environ) == "single" or "TORCHELASTIC_RUN_ID" in os.environ
    return None if alone else mpi.bootstrap()


def _examine(*, measure: bool) -> int:
    """Returns 1 where something required is broken, else 0, having said all about this process."""
    broken = 0
    parts: list[Callable[[], Iterator[Line]]] = [python_lines, package_lines, device_lines, mpi_lines, kernel_lines]
    if measure:
        parts.append(path_lines)
    for part in parts:
        try:
            for works, name, text in part():
                broken += works is False
                print(f"{MARK[works]:<6}  {name:<28}  {text}", flush=True)
        except Exception as error:  # a doctor reports what breaks, whatever it is
            broken += 1
            print(f"{MARK[False]:<6}  {part.__name__.removesuffix('_lines'):<28}  {_sentence(error)}", flush=True)
    return 1 if broken else 0


def python_lines() -> Iterator[Line]:
    """Yields the interpreter and the package itself."""
    yield sys.version_info >= (3, 11), "Python", f"{platform.python_version()} ({sys.executable})"
    yield True, "swin_moe", os.path.dirname(__file__)


def package_lines() -> Iterator[Line]:
    """Yields every required and optional package with its version."""
    from swin_moe.data.torchvision_compat import import_torchvision
    from swin_moe.data.torchvision_site import NAME, MissingOperators

    try:
        requirements = importlib.metadata.requires("swin-moe") or []
    except importlib.metadata.PackageNotFoundError:
        yield None, "packages", "swin-moe is not installed (pip install -e .), so its requirements are not known"
        return
    import_torchvision()  # beside a CPU torch it, and with it timm, imports only with our help
    if MissingOperators.library is not None and NAME not in sys.modules:
        remedy = "your own scripts import it after python -m swin_moe.data.torchvision_site"
        yield None, "torchvision", f"was built for another torch; {remedy}"
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](.+?)['\"]", requirement)
        if extra and extra[1] == "dev":
            continue
        try:
            version = importlib.metadata.version(name)
            module = MODULES.get(name, name)
            if not extra and module:
                imported = importlib.import_module(module)
                # torch's own says for which CUDA it was built; its package on the index does not.
                version = imported.__version__ if name == "torch" else version
            yield True, name, version
        except importlib.metadata.PackageNotFoundError:
            wanted = f"optional, not installed (pip install 'swin-moe[{extra[1]}]')" if extra else "not installed"
            yield None if extra else False, name, wanted
        except Exception as error:  # an installed package that does not import
            yield False, name, f"{version} does not import: {_sentence(error)}"


def device_lines() -> Iterator[Line]:
    """Yields the processor and the CUDA devices."""
    import torch

    from swin_moe import choice_cache

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield True, "cpu", f"{choice_cache.cpu_name()}, {cores} cores usable, {torch.get_num_threads()} threads"
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        size = f"{found.total_memory / 2**30:.0f} GiB"
        yield True, f"cuda:{number}", f"{found.name}, {size}, capability {found.major}.{found.minor}"
    if not torch.cuda.is_available():
        why = (
            "this torch has no CUDA" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda} sees none"
        )
        yield None, "cuda", f"no device: {why}"


def mpi_lines() -> Iterator[Line]:
    """Yields the mpirun that the launcher would use."""
    from launcher.command import find_mpi

    try:
        mpi = find_mpi("")
        yield True, "mpirun", f"{mpi.flavor} ({mpi.mpirun})"
    except ValueError as error:
        yield None, "mpirun", f"{error}; one process and torchrun need none"


def kernel_lines() -> Iterator[Line]:
    """Yields the compiled kernels per device, and whether they compute what their reference does."""
    import torch

    from swin_moe.ops import extension

    found = extension.EXTENSION
    # A library that is there and cannot be loaded is a broken installation; none at all is a choice.
    yield (
        True if found.loaded else (False if found.path else None),
        "compiled kernels",
        found.problem or str(found.path),
    )
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        name = f"{device} kernels"
        if not extension.available(device):
            yield None, name, f"PyTorch operators instead: {extension.why_not(device)}"
            continue
        capability = f" ({extension.cpu_capability()})" if device == "cpu" else ""
        error = _kernel_error(device)
        yield error < 1e-5, name, f"window attention{capability}, error {error:.0e} against the reference in float64"


def path_lines() -> Iterator[Line]:
    """Yields which attention path `auto` takes for common shapes here, and the times that decide."""
    import torch

    from swin_moe.ops.attention.choice import Case, fastest, measure

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    for name, (window, heads, head_dim, cosine) in COMMON.items():
        for dtype in ("float32", "bfloat16"):
            for gradients in (False, True):
                case = Case(
                    device,
                    dtype,
                    "float32",
                    "float32",
                    "float32",
                    window,
                    heads,
                    head_dim,
                    qkv_bias=True,
                    cosine=cosine,
                    shifted=True,
                    padded=False,
                    gradients=gradients,
                    windows=WINDOWS,
                )
                rounds, windows = measure(case)
                times = ", ".join(f"{path} {1e3 * statistics.median(s):.2f}" for path, s in rounds.items())
                kind = f"{dtype}, {'training' if gradients else 'evaluation'}"
                yield True, name, f"{kind}: {fastest(rounds)} ({windows} windows, ms: {times})"


def _kernel_error(device: str) -> float:
    """Returns the largest relative error of a float32 result or gradient of the compiled operator."""
    import torch

    from swin_moe.ops.attention.fused import fused_window_attention
    from swin_moe.ops.attention.reference import AttentionNumbers, attend_map

    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(size, generator=generator) for size in ((2, 9, 14, 192), (169, 2), (2, 9, 14, 64))]
    qkv, table, weight = (x.to(device) for x in draw)
    x, bias = qkv.clone().requires_grad_(), table.clone().requires_grad_()
    out = fused_window_attention(x, bias, num_heads=2, window=(7, 7), shift=(3, 3), scale=0.2)
    found = [out, *torch.autograd.grad(out, [x, bias], weight)]
    x, bias = qkv.double().cpu().requires_grad_(), table.double().cpu().requires_grad_()
    exact_out = attend_map(x, bias, None, None, numbers=AttentionNumbers(2, 7, 7, 3, 3, 0.2, -100.0))
    exact = [exact_out, *torch.autograd.grad(exact_out, [x, bias], weight.double().cpu())]
    return max(float((f.detach().double().cpu() - e.detach()).norm() / e.detach().norm()) for f, e in zip(found, exact))


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


if __name__ == "__main__":
    run()

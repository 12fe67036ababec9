"""The compiled kernels: one library of operators, found and loaded once, before any schema is written in Python.

`swin_moe/_C*.so` is built by setup.py from csrc/ and registers its operators itself (no Python C API), so it serves any
Python but only the torch minor version it was compiled with. Without it every operator runs its Python reference.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LOGGER = logging.getLogger("swin_moe")
NAMESPACE = "swin_moe"
BUILD = "pip install --no-build-isolation -e ."
# What csrc/ leaves in the file: the version is read before anything of a foreign library runs.
_BUILT_FOR = re.compile(rb"swin_moe built for torch (\d+\.\d+)")
_KERNELS = ("window_attention", "window_attention_backward")
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class Extension:
    """What came of looking for the library."""

    path: Path | None = None  # the file, loaded or not
    problem: str = ""  # one sentence; "" = loaded

    @property
    def loaded(self) -> bool:
        """Whether the operators of the library are registered."""
        return not self.problem


def find_and_load(directory: Path, *, allowed: bool, required: bool) -> Extension:
    """Returns what came of looking for a library in a directory, and loads it.

    Raises:
        ImportError: It is required and not loaded, with the reason.
    """
    extension = _load(directory) if allowed else Extension(None, "SWIN_MOE_NO_EXT=1 is set")
    if required and not extension.loaded:
        raise ImportError(f"SWIN_MOE_REQUIRE_EXT=1, but the compiled kernels are missing: {extension.problem}")
    if extension.path is not None and not extension.loaded:
        LOGGER.warning("compiled kernels are not used: %s", extension.problem)
    return extension


def _load(directory: Path) -> Extension:
    paths = sorted(directory.glob("_C*.so"))
    if not paths:
        return Extension(None, f"they were not built ({BUILD} builds them where a C++ compiler is)")
    path = paths[0]
    if len(paths) > 1:
        return Extension(path, f"there are several: {', '.join(p.name for p in paths)}; delete all but the newest")
    ours = ".".join(torch.__version__.split(".")[:2])
    try:
        marks = _BUILT_FOR.findall(path.read_bytes())
        if marks and marks[0].decode() != ours:
            found = marks[0].decode()
            return Extension(path, f"{path.name} was built for torch {found}, this is {torch.__version__}: {BUILD}")
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        first = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        return Extension(path, f"{path.name} does not load with torch {torch.__version__} ({first}): {BUILD}")
    return Extension(path)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


EXTENSION = find_and_load(
    Path(__file__).resolve().parent.parent,
    allowed=not _is_set("SWIN_MOE_NO_EXT"),
    required=_is_set("SWIN_MOE_REQUIRE_EXT"),
)
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def compiled_for(*names: str) -> frozenset[str]:
    """Returns the device types for which the library has a kernel of each of these operators.

    To be kept as a constant, so that a traced model asks no dispatcher. A library of before an operator has none of it.
    """
    known, has_kernel = torch._C._dispatch_has_kernel, torch._C._dispatch_has_kernel_for_dispatch_key
    full = [f"{NAMESPACE}::{name}" for name in names]
    return frozenset(
        device
        for device, key in _DISPATCH_KEYS.items()
        if EXTENSION.loaded and all(known(name) and has_kernel(name, key) for name in full)
    )


COMPILED = compiled_for(*_KERNELS)


def available(device_type: str) -> bool:
    """Returns whether the library has attention kernels for cpu, cuda, ..."""
    return device_type in COMPILED


def kernels_take(x: torch.Tensor, compiled: frozenset[str]) -> bool:
    """Returns whether an operator of which only CUDA has a kernel, compiled for these devices, takes x by it.

    Elsewhere callers keep to PyTorch's operators, which on the CPU are as fast.
    """
    return x.is_cuda and "cuda" in compiled


class Ordinary:
    """Types of tensors that kernels of this processor take; the planner adds those without memory, which stand for
    them while it looks at what would run."""

    types: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)


def is_ordinary(x: torch.Tensor) -> bool:
    """Returns whether x is no fake, distributed or otherwise special tensor, and nothing traces or transforms it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in Ordinary.types:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def why_not(device_type: str) -> str:
    """Returns why there are no compiled kernels for a device type, one clause; "" where there are."""
    if device_type in COMPILED:
        return ""
    if EXTENSION.path is None or EXTENSION.problem:
        return EXTENSION.problem
    if device_type == "cuda":
        return f"{EXTENSION.path.name} has no CUDA kernels (built without nvcc, or for a torch without CUDA)"
    return f"{EXTENSION.path.name} has no kernels for {device_type}"


def digest() -> str:
    """Returns 16 hex digits that tell one build from another; "" where none is loaded."""
    if EXTENSION.path is None or not EXTENSION.loaded:
        return ""
    return hashlib.sha256(EXTENSION.path.read_bytes()).hexdigest()[:16]


def cpu_capability() -> str:
    """Returns the instruction set the CPU kernels run with (default, avx2, avx512_bf16); "" without them."""
    return torch.ops.swin_moe.cpu_capability() if available("cpu") else ""


def define(schema: str) -> torch.library.Library:
    """Returns the library to register kernels with, once an operator of this schema exists.

    The schema is written in Python only where the compiled library has not defined the operator.
    """
    if not hasattr(getattr(torch.ops, NAMESPACE), schema.partition("(")[0]):
        _LIBRARY.define(schema)
    return _LIBRARY


def register(schema: str, kernel: Callable, fake: Callable) -> torch.library.Library:
    """Gives the operator of this schema its plain kernel and what it does to shapes and dtypes; returns the library.

    A compiled kernel of a device type takes precedence over the plain one, which serves the rest.
    """
    library, name = define(schema), schema.partition("(")[0]
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


def add_fake(name: str, fake: Callable) -> None:
    """Adds what an operator of the compiled library does to shapes and dtypes; nothing where there is none, as without
    the library or in one of before the operator."""
    if EXTENSION.loaded and hasattr(getattr(torch.ops, NAMESPACE), name):
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

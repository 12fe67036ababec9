"""The CUDA kernels of csrc/cuda on the host: builds them with g++ and cuda_emulation.h, and calls their launchers.

What is built is kept under build/emulation by a digest of its sources, so that it is built once per change.
"""

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
HERE = Path(__file__).resolve().parent
FLAGS = [
    "-O1",
    "-std=c++17",
    "-fPIC",
    # Statics of templates would otherwise be one for the process: a CUDA build of the extension has the same names.
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-DSWIN_MOE_EMULATION",
    f"-I{HERE}",
    f"-I{CUDA.parent}",
]
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # swin_moe::CudaElement
GUARD = 64  # elements before and after every tensor; not-a-number, and nobody may write them


def build() -> ctypes.CDLL:
    """Returns the library of all launchers, built if its sources have changed; skips the test without g++."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    sources = sorted(CUDA.rglob("*.cu"))
    digest = hashlib.sha256(" ".join(FLAGS[:-2]).encode())
    headers = [*CUDA.rglob("*.cuh"), *CUDA.parent.rglob("*.h"), *HERE.glob("*.h")]
    for path in sorted([*sources, *headers]):
        digest.update(path.read_bytes())
    directory = ROOT / "build" / "emulation"
    library = directory / f"{digest.hexdigest()[:16]}.so"
    directory.parent.mkdir(exist_ok=True)
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not library.exists():
            _build(sources, library)
    loaded = ctypes.CDLL(str(library))
    loaded.swin_moe_window_workspace.restype = ctypes.c_size_t
    return loaded


def _build(sources: list[Path], library: Path) -> None:
    directory = library.parent
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, directory), sources))
    unfinished = library.with_suffix(".unfinished")
    subprocess.run(["g++", "-shared", "-o", unfinished, *objects], check=True)
    unfinished.rename(library)


def _compile(source: Path, directory: Path) -> Path:
    made = directory / f"{source.stem}.o"
    subprocess.run(["g++", *FLAGS, "-x", "c++", "-c", source, "-o", made], check=True)
    return made


class Geometry(ctypes.Structure):
    """swin_moe::WindowGeometry."""

    _fields_ = [(n, ctypes.c_int64) for n in ("height", "width", "rows", "columns")] + [
        (n, ctypes.c_int) for n in ("window_h", "window_w", "shift_h", "shift_w")
    ]

    @classmethod
    def of(cls, height: int, width: int, window: tuple[int, int], shift: tuple[int, int]) -> "Geometry":
        """Returns the geometry of a map, padded to whole windows."""
        return cls(height, width, -(-height // window[0]), -(-width // window[1]), *window, *shift)


WINDOW_TENSORS = (
    "qkv pad_qkv bias_table logit_scale out log_sums grad_out grad_qkv grad_bias_table grad_logit_scale grad_pad_qkv "
    "workspace"
).split()


class WindowLaunch(ctypes.Structure):
    """swin_moe::WindowLaunch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in WINDOW_TENSORS),
        ("geometry", Geometry),
        ("batch", ctypes.c_int64),
        ("num_heads", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("mask_value", ctypes.c_float),
        ("element", ctypes.c_int),
    ]


class MoeLaunch(ctypes.Structure):
    """swin_moe::MoeLaunch."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("rows", "grad_out", "index", "flags", "gate", "out")] + [
        ("outputs", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("top_k", ctypes.c_int),
        ("element", ctypes.c_int),
        ("other_element", ctypes.c_int),
    ]


class Guarded:
    """A tensor in the middle of memory that is not-a-number: what is read beyond it shows, and so does what is written.

    offset: Elements it lies behind an address that is a multiple of 16 bytes.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, offset: int = 0) -> None:
        count, self.first = torch.Size(shape).numel(), GUARD + offset
        self.memory = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype)
        self.tensor = self.memory[self.first : self.first + count].view(shape)

    @classmethod
    def copy(cls, x: Tensor, *, offset: int = 0) -> "Guarded":
        """Returns a guarded copy."""
        made = cls(tuple(x.shape), x.dtype, offset=offset)
        made.tensor.copy_(x)
        return made

    @property
    def address(self) -> int:
        """Of the first element."""
        return self.tensor.data_ptr()

    def intact(self) -> bool:
        """Returns whether the memory around was left alone."""
        last = self.first + self.tensor.numel()
        return bool(self.memory[: self.first].isnan().all() and self.memory[last:].isnan().all())


def window_attention(library: ctypes.CDLL, *, offset: int = 0) -> Callable[..., Tensor]:
    """Returns a function with the arguments of the operator that runs the kernels, differentiable once.

    offset: Elements that tensors lie behind an aligned address.
    """

    class Emulated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, qkv, table, factor, pad, *numbers) -> Tensor:
            given = _inputs(qkv, table, factor, pad, offset)
            made = {"out": Guarded((*qkv.shape[:3], qkv.shape[3] // 3), qkv.dtype, offset=offset)}
            launch = _describe(given | made, numbers)
            if library.swin_moe_window_needs_log_sums(ctypes.byref(launch)):
                g, windows = launch.geometry, len(qkv) * launch.geometry.rows * launch.geometry.columns
                made["log_sums"] = Guarded((windows, launch.num_heads, g.window_h * g.window_w), torch.float32)
            _launch(library.swin_moe_window_forward, given, made, numbers)
            ctx.save_for_backward(qkv, table, factor, pad)
            ctx.numbers, ctx.made = numbers, made if "log_sums" in made else {}
            return made["out"].tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple:
            qkv, table, factor, pad = ctx.saved_tensors
            given = _inputs(qkv, table, factor, pad, offset) | ctx.made
            given["grad_out"] = Guarded.copy(grad_out, offset=offset)
            made = {"grad_qkv": Guarded(qkv.shape, qkv.dtype, offset=offset)}
            for name, x in (("grad_bias_table", table), ("grad_logit_scale", factor), ("grad_pad_qkv", pad)):
                if x is not None:
                    made[name] = Guarded(x.shape, torch.float32)
            launch = _describe(given | made, ctx.numbers)
            size = library.swin_moe_window_workspace(ctypes.byref(launch))
            made["workspace"] = Guarded((size // 4,), torch.float32)
            _launch(library.swin_moe_window_backward, given, made, ctx.numbers)
            names = ("grad_qkv", "grad_bias_table", "grad_logit_scale", "grad_pad_qkv")
            grads = [made[name].tensor if name in made else None for name in names]
            return *(None if g is None else g.to(x.dtype) for g, x in zip(grads, ctx.saved_tensors)), *[None] * 7

    return Emulated.apply


def _inputs(qkv: Tensor, table: Tensor, factor: Tensor | None, pad: Tensor | None, offset: int) -> dict[str, Guarded]:
    given = {"qkv": Guarded.copy(qkv, offset=offset), "bias_table": Guarded.copy(table.float())}
    if factor is not None:
        given["logit_scale"] = Guarded.copy(factor.float())
    if pad is not None:
        given["pad_qkv"] = Guarded.copy(pad, offset=offset)
    return given


def _describe(tensors: dict[str, Guarded], numbers: tuple) -> WindowLaunch:
    heads, window_h, window_w, shift_h, shift_w, scale, mask_value = numbers
    qkv = tensors["qkv"].tensor
    return WindowLaunch(
        geometry=Geometry.of(qkv.shape[1], qkv.shape[2], (window_h, window_w), (shift_h, shift_w)),
        batch=len(qkv),
        num_heads=heads,
        head_dim=qkv.shape[3] // 3 // heads,
        scale=scale,
        mask_value=mask_value,
        element=ELEMENTS[qkv.dtype],
        **{name: guarded.address for name, guarded in tensors.items()},
    )


def _launch(launcher: Callable, given: dict[str, Guarded], made: dict[str, Guarded], numbers: tuple) -> None:
    assert launcher(ctypes.byref(_describe(given | made, numbers)), None) == 0
    assert all(guarded.intact() for guarded in (given | made).values())

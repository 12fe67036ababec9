"""model.attention=auto: which path of the attention half runs, from measured times, kept on disk.

The paths of half.py take turns on random tensors of the case at hand, once per case and machine. Fused, where
it is supported, stays unless another path is more than MARGIN faster: it keeps the least memory and noise must not
choose. Processes that measure at the same time agree: the first to write decides, the others read what is there.
"""

import logging
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swin_moe import choice_cache
from swin_moe.ops import extension
from swin_moe.ops.attention.fused import unsupported, unsupported_shape
from swin_moe.ops.attention.geometry import Pair
from swin_moe.ops.attention.half import HalfShape, HalfTensors, attention_half
from swin_moe.ops.attention.in_windows import choose
from swin_moe.ops.device_clock import device_seconds

LOGGER = logging.getLogger("swin_moe")
OPTION = "model.attention=auto"
MARGIN = 0.10
BUDGET = 0.2  # seconds that one measurement may take; a network has at most eight cases, and two seconds for all
ROUNDS = 4  # in each of which another path has to be faster by MARGIN to replace the first
HOPELESS = 2.0  # a path that takes so many times as long as the fastest is not measured further
FEW_WINDOWS = 4  # with fewer, what is hopeless cannot be told yet
CALLS = 3  # that a device is timed over
# A call of less takes half a millisecond (one Zen 4 core, float32): 10 % of it pays a measurement back after 6000
# calls, and fused was the fastest in all twelve small cases tried, by 1.3 to 2.4 times.
SMALLEST_MACS = 20_000_000


class Measuring:
    """Whether `auto` measures; tests turn it off, and the rules without measurement decide.

    kernels: Compiled ones count as there whether they are or not: a trace of what another machine will run.
    """

    enabled = True
    kernels = False


@dataclass(frozen=True)
class Case:
    """What tells the cost of one attention half from another's."""

    device: str  # cpu, cuda:0, ...
    dtype: str  # of queries, keys and values, as autocast makes them
    input_dtype: str
    weight_dtype: str
    table_dtype: str
    window: Pair
    num_heads: int
    head_dim: int
    qkv_bias: bool
    cosine: bool
    shifted: bool
    padded: bool
    gradients: bool
    windows: int  # of all images, rounded up to a power of two

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward (and backward, with gradients)."""
        tokens, dim = self.window[0] * self.window[1], self.num_heads * self.head_dim
        return self.windows * tokens * dim * (4 * dim + 2 * tokens) * (3 if self.gradients else 1)

    @property
    def contenders(self) -> list[str]:
        """Paths that compute the case; the first is the one that runs unless another is faster."""
        dtype, table = _dtype(self.dtype), _dtype(self.table_dtype)
        device = torch.device(self.device).type
        plain = choose(device, dtype, table, gradients=self.gradients)
        paths = [plain, *(path for path in ("sdpa", "reference") if path != plain)]
        if plain != "analytic" and analytic_works(dtype, table):
            paths.append("analytic")
        problem = unsupported(
            device_type=device, dtype=dtype, head_dim=self.head_dim, window=self.window, table_dtype=table
        )
        if problem:
            _report_once(f"{OPTION}: the fused kernel is left out: {problem}")
        return paths if problem else ["fused", *paths]

    def __str__(self) -> str:
        words = [
            self.device, self.dtype, f"window {self.window[0]}x{self.window[1]}",
            f"{self.num_heads} heads of {self.head_dim}", "cosine" * self.cosine, "shifted" * self.shifted,
            "padded" * self.padded, "training" if self.gradients else "no gradients", f"up to {self.windows} windows",
        ]  # fmt: skip
        return ", ".join(filter(None, words))


def choose_path(wanted: str, x_BHWC: Tensor, tensors: HalfTensors, shape: HalfShape) -> str:
    """Returns the path of half.PATHS that runs for a setting of model.attention.

    Nothing is measured while a graph is traced or no real data is there: fused then, if it is supported.

    Raises:
        ValueError: wanted=fused, and the compiled kernels do not compute this, with the reason.
    """
    if wanted in ("sdpa", "reference"):
        return wanted
    facts = _Facts(
        x_BHWC.device, _computed_dtype(x_BHWC), x_BHWC.dtype, _kept_dtype(tensors), tensors.bias_table.dtype,
        tuple(x_BHWC.shape), shape, tensors.qkv_bias is not None, tensors.logit_scale is not None,
        torch.is_grad_enabled() and (x_BHWC.requires_grad or tensors.qkv_weight.requires_grad),
    )  # fmt: skip
    if torch.compiler.is_compiling() or not Measuring.enabled or not _is_real(x_BHWC):
        return _unmeasured(wanted, facts)
    return _measured(wanted, facts)


class _Facts(NamedTuple):
    """What a choice depends on, as it comes: cheap to collect and to compare in every call."""

    device: torch.device
    dtype: torch.dtype  # of queries, keys and values
    input_dtype: torch.dtype
    weight_dtype: torch.dtype
    table_dtype: torch.dtype
    size: tuple[int, ...]  # (B, H, W, C)
    shape: HalfShape
    qkv_bias: bool
    cosine: bool
    gradients: bool


def _unmeasured(wanted: str, facts: _Facts) -> str:
    """Returns the path by rules alone."""
    if wanted == "analytic":
        return "analytic" if analytic_works(facts.dtype, facts.table_dtype) else "reference"
    head_dim, window, device_type = facts.size[3] // facts.shape.num_heads, facts.shape.window, facts.device.type
    if device_type == "meta" or Measuring.kernels:
        problem = unsupported_shape(head_dim=head_dim, window=window)
    else:
        problem = unsupported(
            device_type=device_type, dtype=facts.dtype, head_dim=head_dim, window=window, table_dtype=facts.table_dtype
        )
    if problem is None:
        return "fused"
    if wanted == "fused":
        raise ValueError(fused_refusal(problem))
    return choose(device_type, facts.dtype, facts.table_dtype, gradients=facts.gradients)


@lru_cache(maxsize=4096)  # 10 us a call; collecting a Case took 60, which small models on fast devices would feel
def _measured(wanted: str, facts: _Facts) -> str:
    """Returns the path, measured where that is asked for and pays."""
    plain = _unmeasured(wanted, facts)
    if wanted != "auto":
        return plain
    case = _case(facts)
    return plain if case.windows == 0 or case.macs < SMALLEST_MACS else _decide(case)


def fused_refusal(problem: str) -> str:
    """Returns the sentence for model.attention=fused where the fused kernel cannot run."""
    return f"model.attention=fused cannot run: {problem}; use model.attention=auto"


def analytic_works(dtype: torch.dtype, table_dtype: torch.dtype) -> bool:
    """Returns whether the analytic path computes a dtype: none of half precision, nor mixed ones."""
    return dtype in (torch.float32, torch.float64) and table_dtype == dtype


def measure(case: Case) -> tuple[dict[str, list[float]], int]:
    """Returns (seconds of each contender per round, number of windows that were measured), the default path first.

    It runs in a thread of its own: gradient mode, autocast, inference mode, hooks on saved tensors (a recomputed block)
    and modes that intercept operators all belong to the calling thread and are not touched; random numbers come from a
    generator of its own.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_measure_here, case).result()


def fastest(rounds: dict[str, list[float]]) -> str:
    """Returns the first path, or the fastest of those that were more than MARGIN faster than it in every round.

    Where linear layers dominate paths differ by a few per cent and single rounds by more: noise must not choose.
    """
    first, *others = rounds
    faster = [p for p in others if all(f > (1 + MARGIN) * o for f, o in zip(rounds[first], rounds[p]))]
    return min(faster, key=lambda path: statistics.median(rounds[path]), default=first)


@cache
def _decide(case: Case) -> str:
    """Returns the path for a case, from disk or measured."""
    contenders = case.contenders
    key = {"option": OPTION, **asdict(case), "window": list(case.window), **_setting(case), "contenders": contenders}
    directory = choice_cache.default_directory()
    existed = choice_cache.path_of(directory, key).exists()
    stored = _stored(directory, key, contenders)
    if stored:
        LOGGER.info("%s: %s: %s, measured before", OPTION, case, stored)
        return stored
    try:
        rounds, windows = measure(case)
    except RuntimeError as error:  # out of memory, or a path that fails here: the run must not end by it
        LOGGER.warning("%s: %s: %s, not measured (%s)", OPTION, case, contenders[0], str(error).split("\n")[0])
        return contenders[0]
    chosen, seconds = fastest(rounds), {path: statistics.median(times) for path, times in rounds.items()}
    value = {"choice": chosen, "seconds": seconds, "windows": windows}
    # A file that was there and holds no choice is broken; one that came meanwhile is another process's choice.
    choice_cache.write(directory, key, value, option=OPTION, replace=existed)
    times = ", ".join(f"{path} {1e3 * s:.2f} ms" for path, s in seconds.items())
    LOGGER.info("%s: %s: %s (%d windows: %s)", OPTION, case, chosen, windows, times)
    return _stored(directory, key, contenders) or chosen


def _stored(directory: Path, key: dict[str, Any], contenders: list[str]) -> str | None:
    value = choice_cache.read(directory, key, option=OPTION)
    return value["choice"] if value and value.get("choice") in contenders else None


def _setting(case: Case) -> dict[str, Any]:
    """Returns what besides the case a time depends on; the number of a device does not matter, its name does."""
    device = torch.device(case.device)
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else choice_cache.cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "library": extension.digest(),
    }


def _case(facts: _Facts) -> Case:
    (batch, height, width, dim), shape = facts.size, facts.shape
    rows, columns = -(-height // shape.window[0]), -(-width // shape.window[1])
    windows = batch * rows * columns
    dtypes = (facts.dtype, facts.input_dtype, facts.weight_dtype, facts.table_dtype)
    dtype, of_input, of_weight, of_table = (str(d).removeprefix("torch.") for d in dtypes)
    return Case(
        str(facts.device), dtype, of_input, of_weight, of_table, shape.window, shape.num_heads,
        dim // shape.num_heads, qkv_bias=facts.qkv_bias, cosine=facts.cosine, shifted=any(shape.shift),
        padded=bool(height % shape.window[0] or width % shape.window[1]), gradients=facts.gradients,
        windows=1 << (windows - 1).bit_length() if windows else 0,
    )  # fmt: skip


def _measure_here(case: Case) -> tuple[dict[str, list[float]], int]:
    device, dtype = torch.device(case.device), _dtype(case.dtype)
    mixed = case.dtype != case.input_dtype or case.dtype != case.weight_dtype
    autocast = torch.autocast(device.type, dtype=dtype, cache_enabled=False) if mixed else nullcontext()
    first, *others = case.contenders
    started = time.perf_counter()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), autocast:
        tensors, windows = _random_tensors(case, device), 1
        if device.type == "cuda":
            return _measure_at_size(case, tensors), case.windows
        for number in range(2 + case.windows.bit_length()):  # the first only warms up
            x, shape = _random_map(case, windows, device)
            once = {path: _seconds(path, x, tensors, shape, case.gradients) for path in (first, *others)}
            if windows >= FEW_WINDOWS:
                limit = HOPELESS * min(once.values())
                others = [path for path in others if once[path] <= limit]
            # The next size takes twice as long, ROUNDS times.
            left = BUDGET - (time.perf_counter() - started)
            if number and (windows >= case.windows or not others or 2 * ROUNDS * sum(once.values()) > left):
                break
            windows *= 2 if number else 1
        rounds: dict[str, list[float]] = {path: [] for path in (first, *others)}
        for _ in range(ROUNDS):
            for path, seconds in rounds.items():
                seconds.append(_seconds(path, x, tensors, shape, case.gradients))
    return rounds, windows


def _measure_at_size(case: Case, tensors: HalfTensors) -> dict[str, list[float]]:
    """Returns the seconds of each contender per round at the case's own number of windows.

    For a device: a few windows there take what the launches take, of which paths have unlike numbers, so none that is
    slow with few is left out. A path for which there is no memory is.

    Raises:
        OutOfMemoryError: There is none for the first path.
    """
    x, shape = _random_map(case, case.windows, tensors.qkv_weight.device)
    first, *others = case.contenders
    once = {}
    for path in (first, *others):
        try:
            _seconds(path, x, tensors, shape, case.gradients)  # only warms up
            once[path] = _seconds(path, x, tensors, shape, case.gradients)
        except torch.OutOfMemoryError:
            if path == first:
                raise
            LOGGER.info("%s: %s: %s is left out: not enough memory", OPTION, case, path)
    limit = HOPELESS * min(once.values())
    rounds: dict[str, list[float]] = {path: [] for path in once if path == first or once[path] <= limit}
    for _ in range(ROUNDS):
        for path, seconds in rounds.items():
            seconds.append(_seconds(path, x, tensors, shape, case.gradients))
    if x.is_cuda:
        torch.cuda.empty_cache()  # what other paths needed is not the run's
    return rounds


def _random_tensors(case: Case, device: torch.device) -> HalfTensors:
    dim, weight, table = case.num_heads * case.head_dim, _dtype(case.weight_dtype), _dtype(case.table_dtype)
    positions = (2 * case.window[0] - 1) * (2 * case.window[1] - 1)
    draw = _Draw(device, case.gradients)
    return HalfTensors(
        draw((3 * dim, dim), weight), draw((3 * dim,), weight) if case.qkv_bias else None, draw((dim, dim), weight),
        draw((dim,), weight), draw((positions, case.num_heads), table),
        draw((case.num_heads, 1, 1), weight) if case.cosine else None,
    )  # fmt: skip


def _random_map(case: Case, windows: int, device: torch.device) -> tuple[Tensor, HalfShape]:
    """Returns (a map of this many windows, a power of two, and what is done with it); at most 8 x 8 in an image."""
    rows = min(1 << (windows.bit_length() - 1) // 2, 8)
    columns = min(windows // rows, 8)
    height, width = (n * w - (w // 2 if case.padded else 0) for n, w in zip((rows, columns), case.window))
    dim = case.num_heads * case.head_dim
    size = (windows // (rows * columns), height, width, dim)
    x = _Draw(device, case.gradients)(size, _dtype(case.input_dtype), std=1.0)
    shift = (case.window[0] // 2, case.window[1] // 2) if case.shifted else (0, 0)
    return x, HalfShape(case.num_heads, case.window, shift, case.head_dim**-0.5)


class _Draw:
    """Draws tensors with a generator of its own: the run's random state is left alone."""

    def __init__(self, device: torch.device, gradients: bool) -> None:
        self.generator, self.gradients = torch.Generator(device).manual_seed(0), gradients

    def __call__(self, size: tuple[int, ...], dtype: torch.dtype, std: float = 0.02) -> Tensor:
        x = torch.empty(size, dtype=dtype, device=self.generator.device).normal_(0.0, std, generator=self.generator)
        return x.requires_grad_(self.gradients)


def _seconds(path: str, x: Tensor, tensors: HalfTensors, shape: HalfShape, gradients: bool) -> float:
    """Returns what one pass takes, on the device or, with one thread, of processor time, to which no other adds."""

    def run() -> None:
        with torch.set_grad_enabled(gradients):
            out = attention_half(x, tensors, shape, path)
            if gradients:
                torch.autograd.grad(out, [x, *(t for t in tensors if t is not None)], torch.ones_like(out))

    if x.is_cuda:
        return device_seconds(run, CALLS)
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    start = clock()
    run()
    return clock() - start


def _computed_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that a linear layer gives for x, float64 being left alone by autocast."""
    device_type = x.device.type
    if device_type in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _is_real(x: Tensor) -> bool:
    """Returns whether there are data to measure with: no meta, fake or other special tensor, no recorded graph."""
    if type(x) not in (Tensor, nn.Parameter) or x.device.type not in ("cpu", "cuda") or torch.jit.is_tracing():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _kept_dtype(tensors: HalfTensors) -> torch.dtype:
    """Returns the dtype of the weights before autocast, which casts them alike on every path: copies that stand for
    the cast (engine/weight_copies.py) are no other case."""
    kind, dtype = tensors.qkv_weight.device.type, tensors.qkv_weight.dtype
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and dtype == torch.get_autocast_dtype(kind):
        return torch.float32
    return dtype


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


@cache
def _report_once(text: str) -> None:
    LOGGER.info("%s", text)

"""What a run shows: JSON lines, TensorBoard, a console line with time left, per-rank log files."""

import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swin_moe.checkpoint.errors import naming
from swin_moe.ops.linear import packed_product, serves

LOGGER = logging.getLogger("swin_moe")
_ERASE_LINE = "\r\x1b[K"

# Dense peak rates by data sheet, FLOP/s: (float32, bfloat16 or float16). Other devices are measured.
DEVICE_PEAKS = {
    "A100": (19.5e12, 312e12),
    "H100": (67e12, 989e12),
    "H200": (67e12, 989e12),
    "B200": (80e12, 2250e12),
}


def peak_flops(device: torch.device, precision: str) -> float:
    """Returns the device's peak, FLOP/s: by data sheet for known GPUs, else the fastest of some measured products.

    Measured are square products in every library that a network's layers may use, at several sizes, within a second:
    where float32 layers run in oneDNN, MKL alone is half as fast as the network. A measurement beside other work may
    still be too low, so a run that is faster is itself the peak (StepRecords, throughput.py).
    """
    half = precision in ("bf16", "fp16")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, rates in DEVICE_PEAKS.items():
            if key in name:
                return rates[half]
    dtype = torch.bfloat16 if half else torch.float64 if precision == "fp64" else torch.float32
    return max(_product_rate(size, device, dtype) for size in ((512, 1024) if device.type == "cpu" else (4096,)))


def _product_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Returns FLOP/s of the fastest of several products (size, size) x (size, size), in the fastest library."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    products: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.matmul]
    products += [packed_product] if serves(a, a) else []
    rates = []
    for product in products:
        for _ in range(8 if size <= 512 else 3):
            start = time.perf_counter()
            product(a, a)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def peak_memory(device: torch.device) -> int:
    """Returns the peak of this process, bytes: allocated device memory on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_logging(directory: Path | None, rank: int) -> None:
    """Sends the log to <directory>/log-rank<r>.txt and, on rank 0, to the console; None: console only."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        file = _LogFile(directory / f"log-rank{rank}.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(file)
    if rank == 0:
        console = _Console(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        LOGGER.addHandler(console)


class _Console(logging.StreamHandler):
    """Lines on a terminal, each in place of a progress bar that stands there."""

    bar_shown = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.bar_shown:
            self.stream.write(_ERASE_LINE)
            self.bar_shown = False
        super().emit(record)


class _LogFile(logging.FileHandler):
    """A log that says once, in one line, that it cannot be written any more; logging prints a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:
        LOGGER.removeHandler(self)
        print(f"{self.baseFilename} cannot be written any more: {sys.exc_info()[1]}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Returns 1:02:03 or 02:03."""
    seconds = int(seconds)
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class Progress:
    """The console line of a run: redrawn in place on a terminal, one line per record elsewhere."""

    def __init__(self, total: int, *, enabled: bool):
        self.total, self.enabled = total, enabled
        # Open MPI gives rank 0 a terminal of its own, also where what it writes goes to a file.
        self.interactive = enabled and sys.stdout.isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ
        self.started = time.monotonic()
        self.first: int | None = None

    def show(self, step: int, text: str) -> None:
        """Shows `text` with a bar and the time left after `step` steps of the run."""
        if not self.enabled:
            return
        if self.first is None:
            self.first, self.started = step, time.monotonic()
        done, elapsed = step - self.first, time.monotonic() - self.started
        left = duration(elapsed / done * (self.total - step)) if done > 0 else "--:--"
        filled = 20 * step // self.total
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {step}/{self.total} | {text} | {left} left"
        if self.interactive:
            width = os.get_terminal_size().columns if sys.stdout.isatty() else 120
            print(_ERASE_LINE + line[: width - 1], end="", flush=True)
            for handler in LOGGER.handlers:
                if isinstance(handler, _Console):
                    handler.bar_shown = True
        else:
            LOGGER.info(line)

    def clear(self) -> None:
        """Ends the redrawn line before something else is printed."""
        if self.interactive:
            print(_ERASE_LINE, end="", flush=True)


class MetricsWriter:
    """Records to metrics.jsonl and, if wanted, TensorBoard; writes on rank 0 only.

    After a resume, records of steps that will be run again are removed, so that every step stands once. An error of
    writing names the file, also where it comes from a thread of TensorBoard's.
    """

    def __init__(self, directory: Path, *, enabled: bool, tensorboard: bool, resume_step: int):
        self.file, self.board, self.directory = None, None, directory
        self._failed = False
        if not enabled:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self._folder = directory / "metrics.jsonl", directory.stat()
        with naming(self.path):
            if self.path.exists():
                text = self.path.read_text(encoding="utf-8", errors="replace")  # of a disk that lost some of it
                kept = [line for line in text.splitlines() if _step_of(line) <= resume_step]
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(line + "\n" for line in kept))
                temporary.replace(self.path)
            self.file = self.path.open("a")
            self._opened = os.fstat(self.file.fileno())
        if tensorboard:
            self.board = _open_board(directory / "tb", resume_step + 1)

    def write(self, step: int, values: dict, *, histograms: dict | None = None) -> None:
        """Appends one record; values are numbers, histograms name -> list of counts per bucket (expert).

        Raises:
            OSError: The run's folder is gone, or the disk is full; names the file.
        """
        if self.file is None:
            return
        self._failed = True  # until it is done
        self._check_folder()
        with naming(self.path):
            self.file.write(json.dumps({"step": step, **values, **(histograms or {})}) + "\n")
            self.file.flush()
        if self.board is not None:
            with naming(self.directory / "tb"):
                _write_board(self.board, step, values, histograms or {})
        self._failed = False

    def _check_folder(self) -> None:
        """Raises OSError where what is written to is no longer there: an open file would not tell.

        The folder itself may stay, where a save wrote into it while it was being removed.
        """
        for path, known in ((self.directory, self._folder), (self.path, self._opened)):
            try:
                same = os.path.samestat(path.stat(), known)
            except FileNotFoundError:
                same = False
            if not same:
                raise FileNotFoundError(f"{path} was removed or moved while the run was writing to it")

    def show(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Writes pictures (height, width, 3) uint8 to TensorBoard and as <run>/pictures/<name>-<step>.png."""
        if self.file is None:
            return
        for name, picture in pictures.items():
            with naming(self.directory / "pictures"):
                save_picture(self.directory, f"{name}-{step:07d}", picture)
            if self.board is not None:
                with naming(self.directory / "tb"):
                    self.board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both files; a failure is told, unless `write` met it before, not raised: all is over."""
        for path, writer in (("metrics.jsonl", self.file), ("tb", self.board)):
            try:
                if writer is not None:
                    writer.close()
            except OSError as error:
                if self._failed:
                    continue
                LOGGER.warning("%s: the last records could not be written: %s", self.directory / path, error)


def save_picture(directory: Path, name: str, picture: np.ndarray) -> Path:
    """Returns the path of the PNG file, <directory>/pictures/<name>.png; picture: (height, width, 3) uint8."""
    from PIL import Image

    path = directory / "pictures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def _write_board(board: Any, step: int, values: dict, histograms: dict) -> None:
    for name, value in values.items():
        if isinstance(value, (int, float)):
            board.add_scalar(name, value, step)
    for name, counts in histograms.items():
        total = sum(counts)
        edges = list(range(len(counts) + 1))
        board.add_histogram_raw(
            name,
            min=0,
            max=len(counts),
            num=total,
            sum=total,
            sum_squares=total,
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )


def _open_board(directory: Path, purge_step: int) -> Any:
    """Returns torch's SummaryWriter, or None with a warning where the tensorboard package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        LOGGER.warning(
            "tensorboard is not installed, so nothing is written for it (metrics.jsonl has everything); install "
            "swin-moe[tensorboard], or set log.tensorboard=false"
        )
        return None
    _silence_threads()
    with naming(directory):
        return SummaryWriter(str(directory), purge_step=purge_step)


def _silence_threads() -> None:
    """Lets a thread of TensorBoard's end without a traceback of its own: the next record raises its error again."""
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        ours = isinstance(arguments.exc_value, OSError) and type(arguments.thread).__module__.startswith("tensorboard.")
        if not ours:
            before(arguments)

    threading.excepthook = hook


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut by a kill, or none of ours
        return float("inf")

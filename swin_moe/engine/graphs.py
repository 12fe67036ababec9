"""How inference commands run a network: CUDA graphs (engine.cuda_graphs), or the CPU's inference form (engine.optimize,
models/optimized.py).

CUDA graphs: the forward of a batch's shape is recorded once and replayed; those of training are in
run/training_graphs.py.

A replay is one call of the host whatever the number of kernels. It reads and writes the memory of the recording, so
inputs are copied in and results copied out, and it does nothing that Python does in a forward: hooks do not run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from swin_moe.config import Config
from swin_moe.config.choices import refuse_choice
from swin_moe.engine.precision import DTYPES
from swin_moe.models.optimized import optimize
from swin_moe.ops.grouped_linear import use_grouped
from swin_moe.ops.packed_layers import INT8_DTYPES

MOST_GRAPHS = 4  # shapes recorded at a time; each keeps the activations of a forward
Output = Tensor | tuple[Tensor, ...]
T = TypeVar("T")


class Recording(NamedTuple):
    """A recorded call."""

    replay: Callable[[], None]  # does again what the call did, on the same memory
    output: Output  # where it leaves its results


def record_on_device(call: Callable[[], Output]) -> Recording:
    """Returns the recording of what a call starts on the current CUDA device.

    Raises:
        RuntimeError: The call waits for the device, or copies from memory that is not pinned.
    """
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: the loader's threads pin memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()
    return Recording(graph.replay, output)


class Recorder(Protocol):
    """Runs and records calls on one device."""

    def eager(self, call: Callable[[], T]) -> T:
        """Returns what the call gives, run as a recording of it is going to be."""

    def record(self, call: Callable[[], Output]) -> Recording:
        """Returns the recording of a call; raises RuntimeError where it cannot be recorded."""


class DeviceRecorder:
    """Records on a stream of its own, all recordings into one pool of memory: they never run at once.

    Also what is not recorded runs on that stream: autograd keeps with a parameter the stream of its first use, and a
    recording must not meet the default stream there.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def eager(self, call: Callable[[], T]) -> T:
        """See Recorder."""
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            result = call()
        outside.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Output]) -> Recording:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's threads pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            output = call()
        return Recording(graph.replay, output)


class _Recorded(NamedTuple):
    images: Tensor
    recording: Recording
    addresses: tuple[int, ...]


class GraphedForward(nn.Module):
    """A network that replays its forward in evaluation, for shapes that it has met before.

    The first batch of a shape runs as always (attention measures its paths there), the second is recorded. Anything
    else runs as always too: a remainder batch that comes once, a forward that may need gradients, training, shapes
    beyond MOST_GRAPHS. Weights may change where they lie; where a parameter or buffer lies elsewhere than at the
    recording, the recording is dropped and made again.

    Args:
        model: Gives a tensor, or a tuple of them.
        record: How a call is recorded; tests on the CPU bring their own.
    """

    def __init__(self, model: nn.Module, record: Callable[[Callable[[], Output]], Recording] = record_on_device):
        super().__init__()
        self.model, self.record = model, record
        self._met: set[tuple] = set()
        self._recorded: dict[tuple, _Recorded] = {}

    def forward(self, images: Tensor) -> Output:
        """Returns what the network gives for images (B, C, H, W), in memory of its own.

        Raises:
            ValueError: The network's forward cannot be recorded.
        """
        if torch.is_grad_enabled() or self.model.training:
            return self.model(images)
        key = _circumstances(images)
        if key not in self._met:
            self._met.add(key)
            return self.model(images)
        recorded, addresses = self._recorded.get(key), self._addresses()
        if recorded is None or recorded.addresses != addresses:
            self._recorded.pop(key, None)
            if len(self._recorded) >= MOST_GRAPHS:
                return self.model(images)
            recorded = self._recorded[key] = self._recording_of(images, addresses)
        recorded.images.copy_(images)
        recorded.recording.replay()
        output = recorded.recording.output
        return tuple(t.clone() for t in output) if isinstance(output, tuple) else output.clone()

    def _recording_of(self, images: Tensor, addresses: tuple[int, ...]) -> _Recorded:
        buffer = images.clone()
        try:
            with _without_cached_casts():
                return _Recorded(buffer, self.record(lambda: self.model(buffer)), addresses)
        except RuntimeError as error:
            first = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"engine.cuda_graphs=true: the forward of a batch of shape {tuple(images.shape)} cannot be recorded "
                f"({first}); use engine.cuda_graphs=false"
            ) from error

    def _addresses(self) -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers()))


def _circumstances(images: Tensor) -> tuple:
    """Returns all that a recorded forward depends on besides the numbers in memory."""
    kind = images.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return images.shape, images.stride(), images.dtype, images.device, cast, torch.is_inference_mode_enabled()


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Returns a context in which autocast keeps no weights: what it kept would be freed with the region around it, and
    replays would read freed memory."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def with_graphs(model: nn.Module, config: Config) -> nn.Module:
    """Returns the network for inference: with graphs where engine.cuda_graphs asks for them, in its inference form
    where engine.optimize does; see check_graphs.

    Raises:
        ValueError: engine.optimize, and there is no such form of the network, with the reason.
    """
    form = config.engine.optimize
    if form:
        try:
            return optimize(model, dtype=DTYPES[config.engine.precision], int8=form == "int8")
        except ValueError as error:
            raise ValueError(f"{_optimize_key(config)}: {error}; use engine.optimize=false") from None
    return GraphedForward(model) if config.engine.cuda_graphs else model


def check_graphs(config: Config, device_type: str, world_size: int, *, features: bool = False) -> None:
    """Raises ValueError where engine.cuda_graphs is set and a forward in evaluation cannot be recorded, or
    engine.optimize and what runs has no inference form.

    features: Only the backbone runs, whatever trained it.
    """
    if config.engine.optimize:
        _check_optimize(config, device_type, features=features)
    if not config.engine.cuda_graphs:
        return
    key = "engine.cuda_graphs=true"
    if device_type != "cuda":
        raise ValueError(f"{key} needs a CUDA device, this run computes on {device_type}; use engine.cuda_graphs=false")
    if not features and not config.task.options.classifies:
        raise ValueError(f"{key} is for task.name=classify, got {config.task.name}; use engine.cuda_graphs=false")
    if world_size > 1 and config.model.moe.has_blocks:
        raise ValueError(f"{key} with MoE blocks runs on one rank, got {world_size}: ranks ask how many rows to send")
    check_rows(config, training=False)


def _optimize_key(config: Config) -> str:
    return f"engine.optimize={str(config.engine.optimize).lower()}"


def _check_optimize(config: Config, device_type: str, *, features: bool) -> None:
    key, instead = _optimize_key(config), "use engine.optimize=false"
    if device_type != "cpu":
        raise ValueError(f"{key} is for the CPU, this run computes on {device_type}; {instead}")
    if features or not config.task.options.classifies:
        named = "evaluate-features" if features else f"task.name={config.task.name}"
        raise ValueError(f"{key} is for whole classifiers, not for {named}; {instead}")
    precision = config.engine.precision
    if config.engine.optimize == "int8" and DTYPES[precision] not in INT8_DTYPES:
        names = " or ".join(name for name, dtype in DTYPES.items() if dtype in INT8_DTYPES)
        raise ValueError(f"{key} needs engine.precision={names} for what is not in int8, got {precision}; {instead}")


def check_rows(config: Config, *, training: bool) -> None:
    """Raises ValueError where a MoE layer on one rank asks the device for rows, whose number a recording would keep."""
    moe, key = config.model.moe, "engine.cuda_graphs=true"
    if not moe.has_blocks:
        return
    refuse_choice(moe, key)
    if moe.backend == "tutel":
        raise ValueError(f"{key} does not run model.moe.backend=tutel; use native or padded")
    if moe.choice != "token":
        return  # as many rows for every expert, whatever the data
    if moe.backend == "padded":
        option, factor = ("", moe.capacity_factor) if training else ("eval_", moe.eval_factor)
        if factor <= 0:
            raise ValueError(
                f"{key} with model.moe.backend=padded needs model.moe.{option}capacity_factor > 0, got {factor}: "
                f"rows by need are counted on the host"
            )
    elif not _is_grouped(config):
        raise ValueError(
            f"{key} with MoE blocks of model.moe.backend=native needs engine.precision=bf16 and channels in multiples "
            f"of 8, got engine.precision={config.engine.precision} and model.embed_dim={config.model.embed_dim}: other "
            f"products ask for the rows of every expert"
        )


def _is_grouped(config: Config) -> bool:
    """Returns whether the products of all experts are grouped ones on CUDA."""
    model, device = config.model, torch.device("cuda")
    stages = [s for s, blocks in enumerate(model.moe.blocks) if any(block >= 0 for block in blocks)]
    dims = [model.embed_dim * 2**stage for stage in stages]
    return all(use_grouped(device, DTYPES[config.engine.precision], dim, int(dim * model.mlp_ratio)) for dim in dims)

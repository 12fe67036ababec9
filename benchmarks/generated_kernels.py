"""Kernels that torch.compile's code starts on a CUDA device, counted on a machine without one.

Inductor writes a graph's code before anything of it is built or run: Triton kernels, and a program that calls them,
matrix products and operators that stay as they are. Here a graph that was traced on the CPU is written once more as if
it were on a device whose properties stand below (they decide, e.g., which sums are cut in two kernels), and the calls
are counted. The graph itself runs operator by operator, so that values flow on. Neither a device nor Triton is needed.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import _disable_current_modes

DEVICE = torch.device("cuda", 0)
# NVIDIA H100 SXM, as CUDA reports it.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
_CALLS = (
    re.compile(r"\b(triton_\w+)\.run\("),
    re.compile(r"\b(extern_kernels\.\w+)\("),
    re.compile(r"\btorch\.ops\.([\w.]+)\("),
    re.compile(r"\b(aten\.[\w.]+)\("),
    re.compile(r"\w\.(copy_|fill_|zero_)\("),
)


class _OnPaper(device_interface.DeviceInterface):
    """What inductor asks a device."""

    class Worker(device_interface.DeviceInterface.Worker):
        """What its workers ask."""

        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: PROPERTIES)

    device = device_interface.CudaInterface.device
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    get_device_properties = staticmethod(lambda device=None: PROPERTIES)
    get_compute_capability = staticmethod(lambda device=None: 10 * PROPERTIES.major + PROPERTIES.minor)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


@contextmanager
def _device_on_paper() -> Iterator[None]:
    device_interface.get_interface_for_device(DEVICE)  # fills the table that is changed below
    with ExitStack() as stack:
        interfaces = {name: _OnPaper for name in ("cuda", "cuda:0")}
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        for name, value in (
            ("torch.cuda.get_device_properties", PROPERTIES),
            ("torch.cuda.get_device_capability", (PROPERTIES.major, PROPERTIES.minor)),
            ("torch.cuda.current_device", 0),
            ("torch._inductor.scheduler.has_triton", True),
            ("torch.utils._triton.triton_hash_with_backend", ""),
        ):
            stack.enter_context(mock.patch(name, lambda *_, value=value, **__: value))
        yield


class _Propagation(FakeTensorProp):
    """Notes numbers as well: torch before 2.13 notes tensors alone, and its inductor asks what a graph returns."""

    def run_node(self, n: fx.Node) -> Any:
        """Returns what a node computes, noted as its value."""
        result = super().run_node(n)
        if isinstance(result, int | float):
            n.meta["val"] = result
        return result


def write_for_device(graph: fx.GraphModule, inputs: list[Any], *, is_backward: bool) -> str:
    """Returns the program that inductor writes for a CUDA device, of a graph on the CPU; only its sizes count."""
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        node.args, node.kwargs = (fx.node.map_aggregate(part, _moved) for part in (node.args, node.kwargs))
        node.meta.pop("val", None)
    graph.recompile()
    written: list[str] = []

    def write(self: GraphLowering) -> None:
        written.append(self.codegen()[0].value)
        raise RuntimeError("written, and not to be built")

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        placed = [_placed(value) for value in inputs]
    _Propagation(graph, mode=mode).propagate_dont_convert_inputs(*placed)
    options = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1}
    with (
        _device_on_paper(),
        torch._inductor.config.patch(options),
        mock.patch.object(GraphLowering, "compile_to_module", write),
        V.set_fake_mode(mode),
        tracing(TracingContext(mode)),
    ):
        try:
            compile_fx.compile_fx_inner(graph, placed, is_backward=is_backward, cudagraphs=compile_fx.BoxedBool(False))
        except Exception:
            if not written:
                raise
    return written[0]


def _moved(argument: Any) -> Any:
    return DEVICE if isinstance(argument, torch.device) else argument


def _placed(value: Any) -> Any:
    """Returns a fake tensor of the device with the sizes of a tensor; numbers as they are now."""
    if not isinstance(value, Tensor):
        return int(value) if isinstance(value, torch.SymInt) else value
    sizes, strides = ([int(n) for n in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=DEVICE)


def calls(program: str, starts_kernel: Callable[[torch._ops.OpOverload], bool]) -> Counter[str]:
    """Returns how often a program of inductor's calls what, by name; Triton's kernels go by the operators in them."""
    counts: Counter[str] = Counter()
    for line in program.partition("async_compile.wait")[2].splitlines():
        code = line.strip()
        if code.startswith(("#", "def get_args")):
            if code.startswith("def"):
                break  # how to run it by itself
            continue
        for pattern in _CALLS:
            for name in pattern.findall(code):
                if pattern is not _CALLS[2] or starts_kernel(_operator(name)):
                    counts[re.sub(r"_\d+$", "", name)] += 1
    return counts


def _operator(name: str) -> torch._ops.OpOverload:
    """Returns torch.ops.`name`, of which inductor always writes the overload."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


class CompiledCounter:
    """A backend of torch.compile that counts, in every run of a graph, what its code would start on a device."""

    def __init__(self, starts_kernel: Callable[[torch._ops.OpOverload], bool]) -> None:
        self.counts: Counter[str] = Counter()
        self._starts_kernel = starts_kernel

    def __call__(self, graph: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        """Returns what runs a traced graph, forward and backward, as inductor divides it."""
        # Inductor asks for an OutputCode, and takes any function that is called with one list.
        compiled = compile_fx.compile_fx(graph, inputs, inner_compile=self._compile)  # type: ignore[arg-type]
        assert callable(compiled), "anything else is what compiling ahead of time gives"
        return compiled

    def _compile(self, graph: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        program = write_for_device(graph, inputs, is_backward=options.get("is_backward", False))
        found = calls(program, self._starts_kernel)

        def run(arguments: list[Any]) -> Any:
            self.counts.update(found)
            held = list(arguments)
            arguments.clear()
            with _disable_current_modes():  # the operators of the graph are no kernels
                return graph(*held)

        run._boxed_call = True  # type: ignore[attr-defined]  # how inductor tells such a function
        return run

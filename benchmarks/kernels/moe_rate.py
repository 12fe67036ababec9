"""How much of the device's matrix rate the experts and the whole MoE layer reach, forward and backward.

    python benchmarks/kernels/moe_rate.py [--device cuda] [--tokens 18432] [--dim 768] [--rounds 20] [--compile]

The rate is that of one large square product in the same precision, measured in the same run and interleaved with what
is compared. Operations are those of the two products of each token, forward, and twice as many backward; router,
gathers and activations count for nothing, so the layer's share says what they cost. Goals on a CUDA device in bf16:
experts 70 %, layer 50 %.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from swin_moe.config import MoEConfig
from swin_moe.moe.dispatch import Dispatcher, LocalDispatcher, PaddedDispatcher
from swin_moe.moe.layer import MoELayer
from swin_moe.randomness import RandomContext

Step = Callable[[], object]


def seconds(step: Step, device: torch.device) -> float:
    """Returns the seconds of one call: of the device on CUDA, CPU time of one thread elsewhere."""
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def product_step(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Step, float]:
    """Returns a square product and its operations."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(a, b), 2.0 * size**3


def layer_steps(
    tokens: int, dim: int, experts: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> tuple[dict[str, Step], float]:
    """Returns forward and backward of the experts alone and of whole layers, and the operations of each."""
    images, per_image = tokens // 144, 144
    config = MoEConfig(num_experts=experts, capacity_factor=1.25, dropout=0.1)
    layer = MoELayer(dim, 4 * dim, config, fc2_bias=False, layer=0, init_std=0.02)
    layer.init_weights(0, "layer")
    layer.to(device).train()
    x = torch.randn(images, per_image, dim, device=device, dtype=dtype, requires_grad=True)
    rows = torch.randn(images * per_image, dim, device=device, dtype=dtype, requires_grad=True)
    seen = torch.randn_like(x)
    even = torch.full((experts,), len(rows) // experts, device=device)
    random = RandomContext(0, 0, torch.arange(images, device=device))
    forward = torch.compile(layer) if compiled else layer

    def clear() -> None:
        for tensor in (x, rows, *layer.parameters()):
            tensor.grad = None

    def only_experts() -> None:
        clear()
        layer.experts(rows, even).backward(seen.view_as(rows))

    def whole(dispatcher: Dispatcher) -> None:
        clear()
        layer.dispatcher = dispatcher
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            y, aux = forward(x, random)
        torch.autograd.backward([y, aux], [seen.to(y.dtype), torch.ones_like(aux)])

    ragged, padded = LocalDispatcher(), PaddedDispatcher()
    steps: dict[str, Step] = {
        "experts": only_experts,
        "layer": lambda: whole(ragged),
        "layer, padded": lambda: whole(padded),
    }
    return steps, 3.0 * 2.0 * 2.0 * len(rows) * dim * 4 * dim


def compare(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Returns the median seconds of each step; they take turns, after two calls that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            taken = seconds(step, device)
            if number >= 2:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints one row per number of experts and step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=18432, help="a multiple of 144")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if not cuda:
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if cuda else "CPU, 1 thread"
    print(f"{name}, {dtype}, torch {torch.__version__}, {options.tokens} tokens, dim {options.dim}, top-1\n")
    print("| experts | what | ms | TFLOP/s | share of the matrix rate |\n|---|---|---|---|---|")
    product, operations = product_step(8192 if cuda else 1024, device, dtype)
    for experts in (8, 32):
        steps, work = layer_steps(options.tokens, options.dim, experts, device, dtype, options.compile)
        found = compare({"product": product, **steps}, options.rounds, device)
        rate = operations / found["product"]
        print(f"| {experts} | one square product | {1e3 * found['product']:.2f} | {rate / 1e12:.2f} | |")
        for what in steps:
            reached = work / found[what]
            print(f"| {experts} | {what} | {1e3 * found[what]:.2f} | {reached / 1e12:.2f} | {reached / rate:.1%} |")


if __name__ == "__main__":
    main()

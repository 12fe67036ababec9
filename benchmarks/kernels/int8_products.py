"""Products of int8 on the CPU: our packed layers in float32, bfloat16 and int8 against what torch offers for int8.

    python benchmarks/kernels/int8_products.py [--rounds 15] [--batch 1]

The linear layers of Swin-T. `ours` takes and gives bfloat16 rows and includes finding each row's scale and rounding it;
`oneDNN` is torch.ops.onednn.qlinear_pointwise (uint8 activations with one scale, int8 weights with a scale a channel,
float32 results), alone and with the quantization of the activations by the largest and smallest number of the batch;
`int_mm` is torch._int_mm of weights in the better of both orders, whole numbers in and out, nothing around it.

One thread; CPU time, medians of interleaved rounds, in GF/s. `error` is that of our int8 against the float32 result,
root mean square over root mean square, on normal numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swin_moe.ops.packed_layers import PackedLinear, packed_layers

# (rows of one image, inputs, outputs) and how many layers of Swin-T have it.
SHAPES = {
    (3136, 96, 288): 2,
    (3136, 96, 384): 2,
    (3136, 384, 96): 2,
    (784, 192, 768): 2,
    (784, 768, 192): 2,
    (196, 384, 1152): 6,
    (196, 384, 1536): 6,
    (196, 1536, 384): 6,
    (49, 768, 3072): 2,
    (49, 3072, 768): 2,
}

COLUMNS = ("ours float32", "bfloat16", "int8", "oneDNN int8", "with quantization", "int_mm")


def quantized(x: Tensor) -> tuple[Tensor, float, int]:
    """Returns (x as uint8, its scale, its zero point): the whole range of its numbers, and zero."""
    low, high = (float(v) for v in torch.aminmax(x))
    scale = max(max(high, 0.0) - min(low, 0.0), 1e-12) / 255
    zero = round(-min(low, 0.0) / scale)
    return torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8), scale, zero


def int8_linear(weight: Tensor, bias: Tensor, rows: int) -> Callable[[Tensor, float, int], Tensor]:
    """Returns what multiplies quantized rows by a weight (O, I), packed in int8 with a scale for each output."""
    scales = weight.abs().amax(1) / 127
    packed = torch.ops.onednn.qlinear_prepack(
        torch.round(weight / scales[:, None]).to(torch.int8), [rows, weight.shape[1]]
    )
    zeros = torch.zeros(len(weight), dtype=torch.int64)

    def call(x: Tensor, scale: float, zero: int) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            x, scale, zero, packed, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )

    return call


def int_mm(rows: int, inputs: int, outputs: int) -> Callable[[], Tensor]:
    """Returns what multiplies whole numbers, weights in the order in which that is faster here."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randint(-127, 128, s, generator=draw, dtype=torch.int8) for s in ((rows, inputs), (outputs, inputs))
    )
    calls = [lambda w=w: torch._int_mm(x, w) for w in (weight.t(), weight.t().contiguous())]
    return min(calls, key=lambda call: min(seconds(call) for _ in range(5)))


def seconds(call: Callable[[], object]) -> float:
    """Returns the CPU time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(shape: tuple[int, int, int], batch: int, rounds: int) -> tuple[list[float], float]:
    """Returns (medians of the seconds of each column; relative error of our int8)."""
    rows, inputs, outputs = shape[0] * batch, *shape[1:]
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    narrow, linear, ready = x.bfloat16(), int8_linear(weight, bias, rows), quantized(x)
    single, half = PackedLinear.of(weight, bias, torch.float32), PackedLinear.of(weight, bias, torch.bfloat16)
    ours = PackedLinear.of(weight, bias, torch.bfloat16, int8=True)
    calls = (
        lambda: packed_layers(x, single),
        lambda: packed_layers(narrow, half, wide=False),
        lambda: packed_layers(narrow, ours, wide=False),
        lambda: linear(*ready),
        lambda: linear(*quantized(x)),
        int_mm(rows, inputs, outputs),
    )
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times):
            taken.append(seconds(call))
    exact = calls[0]()
    error = packed_layers(x, PackedLinear.of(weight, bias, torch.float32, int8=True)) - exact
    return [statistics.median(t[1:]) for t in times], float(error.norm() / exact.norm())


def main() -> None:
    """Prints a row for each shape, and the sum over the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"| rows | inputs | outputs | {' | '.join(COLUMNS)} | error |")
    print(f"|---|---|---|{len(COLUMNS) * '---|'}---|")
    sums = [0.0] * len(COLUMNS)
    for (rows, inputs, outputs), layers in SHAPES.items():
        times, error = measure((rows, inputs, outputs), options.batch, options.rounds)
        sums = [s + layers * t for s, t in zip(sums, times)]
        work = 2e-9 * rows * options.batch * inputs * outputs
        cells = " | ".join(f"{work / t:.0f}" for t in times)
        print(f"| {rows * options.batch} | {inputs} | {outputs} | {cells} | {error:.4f} |", flush=True)
    print("all of them, ms:", ", ".join(f"{name} {1e3 * s:.1f}" for name, s in zip(COLUMNS, sums)))


if __name__ == "__main__":
    main()

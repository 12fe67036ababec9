"""Products of int8 against float32 ones on the CPU: what int8 weights and activations could give a network here.

    python benchmarks/kernels/int8_products.py [--rounds 15] [--batch 1]

The linear layers of Swin-T: our packed float32 operator against oneDNN's quantized product as torch exposes it
(torch.ops.onednn.qlinear_pointwise: uint8 activations with one scale, int8 weights with a scale a channel, float32
results), alone and with the quantization of the activations by the largest and smallest number of the batch.

One thread; CPU time, medians of interleaved rounds; ratios above 1: int8 is faster. `error` is that of int8 against
the float32 result, root mean square over root mean square, on normal numbers.
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


def measure(shape: tuple[int, int, int], batch: int, rounds: int) -> tuple[list[float], float]:
    """Returns (medians of the seconds of float32, int8, and int8 with quantization; relative error)."""
    rows, inputs, outputs = shape[0] * batch, *shape[1:]
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    packed, linear, ready = PackedLinear.of(weight, bias, torch.float32), int8_linear(weight, bias, rows), quantized(x)
    calls = (lambda: packed_layers(x, packed), lambda: linear(*ready), lambda: linear(*quantized(x)))
    times: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for call, taken in zip(calls, times):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    exact = calls[0]()
    return [statistics.median(t[1:]) for t in times], float((calls[1]() - exact).norm() / exact.norm())


def main() -> None:
    """Prints a row for each shape, and the sum over the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| rows | inputs | outputs | float32, GF/s | int8, GF/s | ratio | with quantization | error |")
    print("|---|---|---|---|---|---|---|---|")
    sums = [0.0, 0.0, 0.0]
    for (rows, inputs, outputs), layers in SHAPES.items():
        times, error = measure((rows, inputs, outputs), options.batch, options.rounds)
        sums = [s + layers * t for s, t in zip(sums, times)]
        work = 2e-9 * rows * options.batch * inputs * outputs
        cells = f"{work / times[0]:.0f} | {work / times[1]:.0f} | {times[0] / times[1]:.2f} | {times[0] / times[2]:.2f}"
        print(f"| {rows * options.batch} | {inputs} | {outputs} | {cells} | {error:.4f} |", flush=True)
    single, alone, whole = (1e3 * s for s in sums)
    print(f"all of them: float32 {single:.1f} ms, int8 {alone:.1f}, with quantization {whole:.1f}")


if __name__ == "__main__":
    main()

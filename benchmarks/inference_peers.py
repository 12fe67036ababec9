"""Inference on the CPU against what would be deployed there, in one process, interleaved.

    pip install --target PEERS openvino onnxruntime onnx onnxscript      # beside the project, which needs none of them
    python benchmarks/inference_peers.py --peers PEERS [--exported FOLDER] [--batches 1,8] [--precisions fp32,bf16]
        [--only swin_tiny] [--rounds 9] [--profile | --forms]

Our networks, as they are and by swin_moe.optimize, against timm's of the same name: eager, and exported to ONNX once
(kept in FOLDER) and run by ONNX Runtime (fp32 only) and by OpenVINO with the precision as a hint. Swin-MoE-S, which
they lack, against a SwinTransformerV2 of the same width, depths and size: ratio of active multiply-accumulates per
second.

One thread; times are the process's CPU time, medians over rounds in which all take turns, ratios medians of per-round
ratios; above 1: our optimized form is faster. `of peak` is its share of the fastest product of its dtype measured here.
--profile prints what each operator of the optimized form takes instead, --forms a table of our forms against each
other, int8 and bytes of packed weights among them.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_step import PAIRS, Pair

import swin_moe
from swin_moe.data.torchvision_compat import import_torchvision
from swin_moe.engine.precision import DTYPES, autocast
from swin_moe.models.network import Network
from swin_moe.ops.packed_layers import PackedLinear, packed_layers

CHOSEN = ("swin_tiny", "swinv2_tiny", "swin_moe_small")
Call = Callable[[], Any]


def torch_call(model: nn.Module, images: Tensor, precision: str) -> Call:
    """Returns what runs a module; an optimized one has its precision."""

    def call() -> Any:
        with torch.inference_mode(), autocast(precision, images.device):
            return model(images)

    return call


def exported(pair: Pair, batch: int, folder: Path) -> Path:
    """Returns the ONNX file of timm's network for a batch, which is written where there is none."""
    path = folder / f"{pair.name}_{batch}.onnx"
    if not path.exists():
        import_torchvision()
        model = pair.theirs().eval()
        torch.onnx.export(
            model, (torch.randn(batch, 3, pair.size, pair.size),), str(path), opset_version=18, external_data=False
        )
    return path


def onnxruntime_call(path: Path, images: Tensor) -> Call:
    """Returns what runs an exported network in ONNX Runtime."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, inputs)


def openvino_call(path: Path, images: Tensor, precision: str) -> Call:
    """Returns what runs an exported network in OpenVINO."""
    openvino = importlib.import_module("openvino")
    hints = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(str(path)), "CPU", hints).create_infer_request()
    inputs = images.numpy()
    return lambda: request.infer([inputs])


def calls(pair: Pair, batch: int, precision: str, options: argparse.Namespace) -> dict[str, Call]:
    """Returns name -> what runs once, ours first."""
    images = torch.randn(batch, 3, pair.size, pair.size, generator=torch.Generator().manual_seed(0))
    ours, folder = pair.ours().eval(), Path(options.exported)
    found = {
        "optimized": torch_call(swin_moe.optimize(ours, dtype=DTYPES[precision]), images, "fp32"),
        "eager": torch_call(ours, images, precision),
        "timm": torch_call(pair.theirs().eval(), images, precision),
    }
    if options.peers:
        path = exported(pair, batch, folder)
        if precision == "fp32":
            found["onnxruntime"] = onnxruntime_call(path, images)
        found["openvino"] = openvino_call(path, images, precision)
    return found


def cpu_seconds(call: Call) -> float:
    """Returns the CPU time of one call, of all threads of the process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def product_peak(dtype: torch.dtype) -> float:
    """Returns multiply-accumulates a second of a large product by the optimized form's operator, the best of ten."""
    x = torch.randn(1024, 768, dtype=dtype)
    packed = PackedLinear.of(torch.randn(3072, 768), None, dtype)
    return x.numel() * 3072 / min(cpu_seconds(lambda: packed_layers(x, packed, wide=False)) for _ in range(10))


def compare(pair: Pair, batch: int, precision: str, options: argparse.Namespace) -> None:
    """Prints the table row of one network, batch and precision."""
    found = calls(pair, batch, precision, options)
    for call in found.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(options.rounds):
        for name in list(found) if number % 2 else reversed(list(found)):
            times[name].append(cpu_seconds(found[name]))
    macs, theirs = pair.macs()
    cells = []
    for name in ("optimized", "eager", "timm", "onnxruntime", "openvino"):
        if name not in times:
            cells.append("-")
            continue
        scale = 1.0 if name in ("optimized", "eager") else macs / theirs
        ratio = statistics.median(scale * t / own for t, own in zip(times[name], times["optimized"]))
        cells.append(f"{1e3 * statistics.median(times[name]):.1f} ({ratio:.2f})")
    if macs == 1.0:
        model = pair.ours()
        assert isinstance(model, Network)
        macs = model.active_flops()
    share = macs * batch / statistics.median(times["optimized"]) / product_peak(DTYPES[precision])
    print(f"| {pair.name} | {batch} | {precision} | {' | '.join(cells)} | {share:.0%} |", flush=True)


def profile(pair: Pair, batch: int, precision: str) -> None:
    """Prints the operators of the optimized form by their time."""
    images = torch.randn(batch, 3, pair.size, pair.size)
    call = torch_call(swin_moe.optimize(pair.ours().eval(), dtype=DTYPES[precision]), images, "fp32")
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(3):
            call()
    print(f"{pair.name}, batch {batch}, {precision}")
    events = found.key_averages(group_by_input_shape=True)
    print(events.table(sort_by="self_cpu_time_total", row_limit=24, max_shapes_column_width=60))


FORMS: dict[str, dict] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "int8, fp32": {"int8": True},
    "int8, bf16": {"int8": True, "dtype": torch.bfloat16},
}


def weight_bytes(form: nn.Module) -> int:
    """Returns bytes of all packed weights of an optimized form."""
    seen: dict[int, int] = {}
    waiting: list[Any] = [form.__dict__]
    while waiting:
        found = waiting.pop()
        if isinstance(found, PackedLinear):
            seen[id(found)] = found.data.numel()
        elif isinstance(found, dict | list | tuple):
            waiting += found.values() if isinstance(found, dict) else found
        elif type(found).__module__ == type(form).__module__:
            waiting.append(vars(found))
    return sum(seen.values())


def compare_forms(pair: Pair, batch: int, rounds: int) -> None:
    """Prints the table row of our forms of one network."""
    images = torch.randn(batch, 3, pair.size, pair.size, generator=torch.Generator().manual_seed(0))
    model = pair.ours().eval()
    forms = {name: swin_moe.optimize(model, **options) for name, options in FORMS.items()}
    found = {name: torch_call(form, images, "fp32") for name, form in forms.items()}
    exact = found["fp32"]()
    errors = [float((call() - exact).norm() / exact.norm()) for call in found.values()]
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        for name in list(found) if number % 2 else reversed(list(found)):
            times[name].append(cpu_seconds(found[name]))
    best = times["int8, bf16"]
    cells = [
        f"{1e3 * statistics.median(t):.1f} ({statistics.median(a / b for a, b in zip(t, best)):.2f})"
        for t in times.values()
    ]
    sizes = ", ".join(f"{weight_bytes(form) / 1e6:.1f}" for form in list(forms.values())[:3])
    said = ", ".join(f"{error:.4f}" for error in errors[1:])
    print(f"| {pair.name} | {batch} | {' | '.join(cells)} | {sizes} | {said} |", flush=True)


def main() -> None:
    """Prints one row per network, batch and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="folder that pip installed the peers into")
    parser.add_argument("--exported", default=tempfile.gettempdir(), help="folder of ONNX files")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--forms", action="store_true", help="our own forms only")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)  # last: what the project has stays
    torch.set_num_threads(1)
    if options.forms:
        print(
            f"| network | batch | {' | '.join(FORMS)} | MB: fp32, bf16, int8 | error of {', '.join(list(FORMS)[1:])} |"
        )
        print("|---|---|---|---|---|---|---|---|")
    else:
        print("| network | batch | precision | optimized | eager | timm | onnxruntime | openvino | of peak |")
        print("|---|---|---|---|---|---|---|---|---|")
    for pair in PAIRS:
        if pair.name not in CHOSEN or options.only not in pair.name:
            continue
        for batch in map(int, options.batches.split(",")):
            if options.forms:
                compare_forms(pair, batch, options.rounds)
                continue
            for precision in options.precisions.split(","):
                if options.profile:
                    profile(pair, batch, precision)
                else:
                    compare(pair, batch, precision, options)


if __name__ == "__main__":
    main()

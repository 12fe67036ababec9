"""Operators of detectors, compiled and plain torch alternately, on one thread.

    python benchmarks/kernels/detection_ops.py [--repeats 9]

RoIAlign of 512 boxes, 256 channels, 7 x 7 bins of a 200 x 304 map at stride 4 (an image of 800 x 1216), forward and
backward; plain is two matrices for every box over the part of the map that it covers. Suppression of 2,000 boxes, and
of 8,000 boxes of 80 classes. Printed are medians in milliseconds of processor time, which other programs hardly change,
and their ratio (above 1: the compiled operator is faster).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swin_moe.ops import extension
from swin_moe.ops.detection import nms, roi_align, soft_nms

MAP, CHANNELS, STRIDE, BOXES = (200, 304), 256, 4, 512
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def boxes(count: int, generator: torch.Generator) -> Tensor:
    """Returns boxes of 16 to 224 pixels a side inside the image, those of the finest level."""
    side = 16 * 14 ** torch.rand(count, 2, generator=generator)
    room = torch.tensor([MAP[1], MAP[0]]) * STRIDE - side
    low = torch.rand(count, 2, generator=generator) * room
    return torch.cat([low, low + side], dim=1)


def cases() -> dict[str, Pair]:
    """Returns name -> (compiled, plain)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, CHANNELS, *MAP, generator=generator)
    rois = torch.cat([torch.zeros(BOXES, 1), boxes(BOXES, generator)], dim=1)
    numbers = (1 / STRIDE, 0, True)
    grad = torch.randn(BOXES, CHANNELS, 7, 7, generator=generator)
    verb = torch.ops.swin_moe
    many, scores = boxes(2000, generator), torch.rand(2000, generator=generator)
    of_classes, class_scores = boxes(8000, generator), torch.rand(8000, generator=generator)
    label = torch.arange(8000) % 80
    return {
        "roi_align": (
            lambda: verb.roi_align(features, rois, 7, *numbers),
            lambda: align_cropped(features, rois, 7, *numbers),
        ),
        "roi_align, backward": (
            lambda: verb.roi_align_backward(grad, rois, 1, *MAP, *numbers),
            lambda: spread_cropped(grad, rois, 1, MAP[0], MAP[1], *numbers),
        ),
        "nms, 2,000 boxes": (
            lambda: verb.nms(many, scores, None, 0.7),
            lambda: nms._nms(many, scores, None, 0.7),
        ),
        "nms, 8,000 boxes, 80 classes": (
            lambda: verb.nms(of_classes, class_scores, label, 0.5),
            lambda: nms._nms(of_classes, class_scores, label, 0.5),
        ),
        "soft_nms, 2,000 boxes": (
            lambda: verb.soft_nms(many, scores, None, 0.3, 0.5, False, 0.05),
            lambda: soft_nms._soft_nms(many, scores, None, 0.3, 0.5, False, 0.05),
        ),
    }


def align_cropped(features: Tensor, rois: Tensor, size: int, scale: float, sampling: int, aligned: bool) -> Tensor:
    """Returns roi_align by two matrices for every box over the part of the map that it covers."""
    y, x = roi_align._matrices(rois, features.shape[2:], size, scale, sampling, aligned)
    out = []
    for r, image in enumerate(rois[:, 0].long().tolist()):
        rows, columns = _covered(y[r]), _covered(x[r])
        across = features[image, :, rows, columns] @ x[r, :, columns].T
        out.append(y[r, :, rows] @ across)
    return torch.stack(out)


def spread_cropped(
    grad: Tensor, rois: Tensor, batch: int, height: int, width: int, scale: float, sampling: int, aligned: bool
) -> Tensor:
    """Returns roi_align_backward, likewise."""
    y, x = roi_align._matrices(rois, (height, width), grad.shape[2], scale, sampling, aligned)
    out = grad.new_zeros(batch, grad.shape[1], height, width)
    for r, image in enumerate(rois[:, 0].long().tolist()):
        rows, columns = _covered(y[r]), _covered(x[r])
        out[image, :, rows, columns] += y[r, :, rows].T @ (grad[r] @ x[r, :, columns])
    return out


def _covered(weights: Tensor) -> slice:
    """Returns the cells of an axis that any bin takes."""
    cells = weights.abs().sum(0).nonzero().flatten()
    return slice(int(cells[0]), int(cells[-1]) + 1)


def milliseconds(call: Callable[[], Tensor]) -> float:
    """Returns the processor time of a call."""
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if "cpu" not in extension.compiled_for("roi_align", "nms", "soft_nms"):
        raise SystemExit("the compiled kernels are missing")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.repeats} repeats\n")
    print("| operator | plain torch, ms | compiled, ms | ratio |\n|---|---|---|---|")
    for name, (compiled, plain) in cases().items():
        torch.testing.assert_close(compiled(), plain(), rtol=1e-4, atol=1e-4)
        times = [[milliseconds(call) for call in (compiled, plain)] for _ in range(options.repeats)]
        new, old = (statistics.median(column) for column in zip(*times))
        print(f"| {name} | {old:.1f} | {new:.2f} | {old / new:.1f} |", flush=True)


if __name__ == "__main__":
    main()

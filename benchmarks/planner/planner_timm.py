"""Prints what eager SwinV2 should reach on three GPUs by their data sheets, beside what timm's repository says that it
reached there. Nothing is fitted; docs/scaling.md says what follows for the speeds that arXiv:2206.03382 publishes.

    python benchmarks/planner/planner_timm.py

timm's SwinV2 is the official one's operators, under automatic mixed precision with fp16, images channels first. Facts
of huggingface/pytorch-image-models at aa4b5850: results/benchmark-infer-amp-nchw-pt240-cu124-rtx3090.csv and
-rtx4090.csv, -pt291-cu130-5090.csv, benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv (a step has an optimizer, no
loader).
"""

from statistics import median

from eager_swinv2 import Network, seconds

from swin_moe.planner.hardware import load_hardware

WIDTHS = {
    "tiny": (96, (2, 2, 6, 2)),
    "small": (96, (2, 2, 18, 2)),
    "base": (128, (2, 2, 18, 2)),
    "large": (192, (2, 2, 18, 2)),
}
# (size, pixels, window) -> GMACs of an image, then (images of a batch, images/s) by run; None where it was not run.
INFERENCE = ("rtx_3090", "rtx_4090", "rtx_5090")
ROWS: dict[tuple[str, int, int], tuple[float, tuple, tuple | None]] = {
    ("tiny", 256, 8): (5.96, ((1024, 1208.62), (1024, 1547.17), (1024, 2462.5)), (192, 354.35)),
    ("small", 256, 8): (11.58, ((1024, 741.58), (1024, 964.83), (1024, 1528.83)), (96, 212.59)),
    ("base", 256, 8): (20.37, ((1024, 531.77), (768, 704.56), (1024, 1094.9)), (64, 150.28)),
    ("tiny", 256, 16): (6.68, ((512, 783.75), (384, 949.54), (512, 1537.17)), (96, 237.41)),
    ("small", 256, 16): (12.82, ((512, 489.28), (384, 601.52), (512, 966.16)), (64, 142.83)),
    ("base", 256, 16): (22.02, ((384, 357.24), (384, 443.63), (512, 709.34)), (48, 103.68)),
    ("large", 256, 16): (47.81, ((256, 218.3), (192, 282.09), (256, 445.07)), (24, 60.93)),
    ("base", 192, 12): (11.9, ((1024, 804.65), (1024, 1028.07), (1024, 1615.44)), None),
    ("large", 192, 12): (26.17, ((512, 480.44), (512, 647.21), (768, 995.57)), None),
    ("base", 384, 24): (55.25, ((64, 96.33), (64, 116.6), (96, 193.55)), (12, 28.14)),
    ("large", 384, 24): (116.15, ((48, 61.02), (48, 74.51), (64, 124.01)), (6, 16.59)),
}


def predicted(row: tuple[str, int, int], machine: str, images: int, *, training: bool) -> float:
    """Returns images/s."""
    size, pixels, window = row
    network = Network(*WIDTHS[size], pixels, window, classes=21841 if pixels == 192 else 1000)
    return images / seconds(images, network, ROWS[row][0] * 1e9, load_hardware(machine), training=training)


def main() -> None:
    names = [f"{name.upper().replace('_', ' ')}, inference" for name in INFERENCE] + ["RTX 3090, training"]
    print(f"| SwinV2 | {' | '.join(names)} |\n|--|{'--|' * len(names)}")
    residuals: list[list[float]] = [[] for _ in names]
    for row, (_, inference, training) in ROWS.items():
        cells = []
        for i, (machine, run) in enumerate(zip((*INFERENCE, "rtx_3090"), (*inference, training), strict=True)):
            if run is None:
                cells.append("")
                continue
            images, published = run
            speed = predicted(row, machine, images, training=i == len(INFERENCE))
            residuals[i].append(speed / published - 1)
            cells.append(f"{published:.0f}, {speed:.0f} ({100 * residuals[i][-1]:+.0f} %)")
        print(f"| {row[0]}, {row[1]} pixels, window {row[2]} | {' | '.join(cells)} |", flush=True)
    print(f"| median | {' | '.join(f'{100 * median(r):+.0f} %' for r in residuals)} |")


if __name__ == "__main__":
    main()

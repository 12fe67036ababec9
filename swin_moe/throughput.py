"""Inference speed by the official protocol: one batch, 50 forwards to warm up, 30 timed; and the memory it took."""

import time

import torch

from swin_moe.data.batch import to_device
from swin_moe.engine.graphs import check_graphs, with_graphs
from swin_moe.engine.precision import autocast
from swin_moe.evaluate import build_eval_loader
from swin_moe.run.metrics import LOGGER, peak_flops, peak_memory, start_logging
from swin_moe.run.session import build_classifier, open_session, parse_arguments, run_main
from swin_moe.usage.texts import THROUGHPUT

WARMUP, TIMED = 50, 30  # microsoft/Swin-Transformer, main.py:throughput


@torch.inference_mode()
def measure(model: torch.nn.Module, images: torch.Tensor, context) -> float:
    """Returns the seconds of one forward, mean over TIMED."""

    def synchronize() -> None:
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    for count in (WARMUP, TIMED):
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            with context():
                model(images)
        synchronize()
    return (time.perf_counter() - start) / TIMED


def main(argv: list[str]) -> None:
    """Prints the throughput of a configuration."""
    path, overrides = parse_arguments(argv, THROUGHPUT)
    session = open_session(path, overrides)
    start_logging(None, session.rank)
    check_graphs(session.config, session.device.type, session.world_size)
    model = build_classifier(session)
    loader = build_eval_loader(session.config, session)
    precision, int8 = session.config.engine.precision, session.config.engine.optimize == "int8"
    images = to_device(next(iter(loader)), session.device, precision)["image"]
    if not len(images):
        raise ValueError(f"rank {session.rank} got no image to measure with; use fewer ranks or data.name=synthetic")
    peaks = [peak_flops(session.device, precision)]
    graphed = with_graphs(model.eval(), session.config)
    seconds = measure(graphed, images, lambda: autocast(precision, session.device))
    rate = len(images) * session.world_size / seconds
    flops = 2 * model.active_flops() * rate / session.world_size
    peaks += [peak_flops(session.device, precision), flops]  # again: other work may have slowed the first
    LOGGER.info(
        "%.1f images/s (%d ranks, batch %d a rank, %s), %.1f%% of %speak, peak memory %.2f GiB a rank",
        rate,
        session.world_size,
        len(images),
        f"int8, the rest {precision}" if int8 else precision,
        100 * flops / max(peaks[:2] if int8 else peaks),
        f"{precision}'s " if int8 else "",
        peak_memory(session.device) / 2**30,
    )


if __name__ == "__main__":
    run_main(main)

"""What a metrics record costs: a training step with everything that a record needs, against the same step without.

    python benchmarks/training/observability.py [--config NAME] [--batch 8] [--rounds 20]

Both take turns on one network in one process, one CPU thread, CPU time. The record is the trainer's: load, drops and
entropy of every MoE layer, the clock of its phases, one line of JSON and TensorBoard scalars and histograms. The goal
is less than 1 % of the step time at the configured interval (log.every, 10 by default).
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from swin_moe.config import LogConfig
from swin_moe.config.io import find_config, load_config
from swin_moe.models.build import build_model
from swin_moe.parallel.groups import single_process_groups
from swin_moe.randomness import RandomContext
from swin_moe.run.expert_load import expert_load, moe_layers, phase_times, start_clocks
from swin_moe.run.metrics import MetricsWriter


def main() -> None:
    """Prints the median step with and without a record, and the cost at the default interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="swin_moe_small_patch4_window12_192_8expert_32gpu_22k")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(find_config(options.config)).model
    model = build_model(replace(config, num_classes=1000))
    model.init_weights(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    image = torch.randn(options.batch, 3, *config.img_size)
    label = torch.arange(options.batch)
    groups, device = single_process_groups(), torch.device("cpu")

    def step(number: int) -> None:
        optimizer.zero_grad()
        logits, aux = model(image, RandomContext(0, number, label))
        (F.cross_entropy(logits, label) + aux).backward()
        optimizer.step()

    times: dict[str, list[float]] = {"plain": [], "recorded": []}
    with tempfile.TemporaryDirectory() as folder:
        writer = MetricsWriter(Path(folder), enabled=True, tensorboard=True, resume_step=0)
        for number in range(options.rounds + 1):
            for name in times:
                start = time.process_time()
                if name == "recorded":
                    start_clocks(model, device)
                step(number)
                if name == "recorded":
                    numbers, histograms = expert_load(model, groups)
                    writer.write(number + 1, {**numbers, **phase_times(model, groups)}, histograms=histograms)
                if number:  # the first round warms up
                    times[name].append(time.process_time() - start)
        writer.close()
    plain, recorded = (statistics.median(times[name]) for name in times)
    share = statistics.median(b / a - 1 for a, b in zip(times["plain"], times["recorded"]))
    every = LogConfig().every
    print(f"{options.config}, batch {options.batch}, {len(moe_layers(model))} MoE layers, 1 thread, CPU time")
    print(f"step {1e3 * plain:.1f} ms, with a record {1e3 * recorded:.1f} ms: {share:+.2%} (median of rounds)")
    print(f"with a record every {every} steps: {share / every:+.3%} of the step time")


if __name__ == "__main__":
    main()

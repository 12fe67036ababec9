"""What a run records of its steps: sums over a window of steps, then one record, and the console's line."""

import functools
import time

import torch

from swin_moe.engine.base import Engine, StepStats
from swin_moe.run.expert_load import exchange_cost, expert_load, links, phase_times
from swin_moe.run.held import held_bytes
from swin_moe.run.metrics import MetricsWriter, Progress, peak_flops, peak_memory
from swin_moe.run.session import Session

# What a phase of the heartbeat begins with -> what its seconds are recorded as; the first that fits.
_PHASES = {
    "forward and backward": "forward_backward",
    "forward": "forward",
    "backward": "backward",
    "reduction": "update",
    "loading data": "loading",
}


@functools.cache
def _peak(device: torch.device, precision: str) -> float:
    """Returns peak_flops, measured once in a process: half a second, more than a small run takes."""
    return peak_flops(device, precision)


class StepRecords:
    """Adds steps up and writes a record every log.every of them, and after the last.

    Args:
        total: Steps of the run.
        steps_per_epoch: Counts epochs.
    """

    def __init__(self, session: Session, engine: Engine, *, total: int, steps_per_epoch: int) -> None:
        self.session, self.engine = session, engine
        self.total, self.steps_per_epoch = total, steps_per_epoch
        self.start_anew()

    def open(self, writer: MetricsWriter, bar: Progress) -> None:
        """Begins to record, to these."""
        self.writer, self.bar = writer, bar
        self.peak = _peak(self.session.device, self.session.config.engine.precision)
        self.start_anew()

    def start_anew(self) -> None:
        """Begins a window: what an evaluation or a save took and sent belongs to no step."""
        for _, link in links(self.engine.local_model):
            link.take()
        self.session.heartbeat.take_seconds()
        self.began, self.images, self.steps, self.loss, self.aux = time.monotonic(), 0.0, 0, 0.0, 0.0

    def due(self, step: int) -> bool:
        """Returns whether a record is written after `step` steps of the run."""
        return step % self.session.config.log.every == 0 or step == self.total

    def add(self, step: int, *, task_loss: float, aux_loss: float, images: float, stats: StepStats) -> None:
        """Adds the step that made it `step` steps to the window; at the end of one, writes the record and redraws the
        bar."""
        self.images += images
        self.steps += 1
        self.loss += task_loss
        self.aux += aux_loss
        if not self.due(step):
            return
        rate = self.images / (time.monotonic() - self.began)
        model, groups = self.engine.local_model, self.session.groups
        # Forward and backward cost three forwards (two operations per multiply-accumulate).
        flops = 6 * model.active_flops() * rate / self.session.world_size
        self.peak = max(self.peak, flops)
        values = {
            "train/loss": self.loss / self.steps,
            "train/aux": self.aux / self.steps,
            "train/lr": stats.lr,
            "train/grad_norm": stats.grad_norm,
            "train/clip_factor": stats.clip_factor,
            "train/loss_scale": stats.loss_scale,
            "train/epoch": step / self.steps_per_epoch,
            "speed/images_per_second": rate,
            "speed/mfu_percent": 100 * flops / self.peak,
            "speed/ranks": self.session.world_size,
            "memory/peak_bytes": peak_memory(self.session.device),
            **{f"memory/{name}_bytes": size for name, size in held_bytes(self.engine).items()},
            **self._phases(),
        }
        load, histograms = expert_load(model, groups)
        cost = exchange_cost(model, groups, self.steps)
        self.writer.write(step, {**values, **load, **phase_times(model, groups), **cost}, histograms=histograms)
        self.bar.show(
            step,
            f"epoch {values['train/epoch']:.1f} | loss {values['train/loss']:.4f} | lr {stats.lr:.2e} "
            f"| {rate:.0f} img/s",
        )
        self.start_anew()

    def _phases(self) -> dict[str, float]:
        """Returns speed/s_<phase>, seconds of this rank per step; {} beside a device, which the host runs ahead of."""
        if self.session.device.type != "cpu":
            return {}
        spent = self.session.heartbeat.take_seconds()
        found = dict.fromkeys(_PHASES.values(), 0.0)
        for phase, seconds in spent.items():
            name = next((name for start, name in _PHASES.items() if phase.startswith(start)), "")
            if name:
                found[name] += seconds / self.steps
        return {f"speed/s_{name}": seconds for name, seconds in found.items() if seconds}

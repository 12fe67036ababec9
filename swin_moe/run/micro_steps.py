"""Forward and backward of a step's micro-batches, as they are written or from recordings."""

import torch
import torch.distributed as dist
from torch import Tensor

from swin_moe.data.batch import Batch, to_device
from swin_moe.data.loader import StepBatches
from swin_moe.engine.base import Engine
from swin_moe.run.session import Session
from swin_moe.run.training_graphs import graphs_of
from swin_moe.tasks.base import StepContext, Task


class MicroSteps:
    """Runs the micro-batches of a step of one task on one engine."""

    def __init__(self, session: Session, task: Task, engine: Engine) -> None:
        self.session, self.task, self.engine = session, task, engine
        self.graphs = graphs_of(session.config, task, engine, session.device)

    @property
    def has_phases(self) -> bool:
        """Whether the phases of a MoE layer can be timed: a graph has none."""
        return self.graphs is None and self.session.config.parallel.compile == "none"

    def weigh(self, batches: StepBatches) -> float | None:
        """Returns what the step weighs over all ranks (Task.weigh); None where the task weighs nothing."""
        own = [self.task.weigh(batch) for batch in batches]
        if own[0] is None:
            return None
        total = torch.tensor(sum(weight or 0.0 for weight in own), dtype=torch.float64, device=self.session.device)
        if self.session.world_size > 1:
            dist.all_reduce(total)
        return float(total)

    def run(self, batches: StepBatches, context: StepContext, *, watched: bool = False) -> Tensor:
        """Returns (2,) float64, this rank's task loss and auxiliary loss, having accumulated gradients.

        watched: Hooks look on, so nothing is replayed.
        """
        device, precision = self.session.device, self.session.config.engine.precision
        losses = torch.zeros(2, dtype=torch.float64, device=device)
        for index, batch in enumerate(batches):
            batch = to_device(batch, device, precision)
            with self.engine.micro_step(last=index == len(batches) - 1):
                if self.graphs is None or watched:
                    losses += self._as_written(batch, context)
                else:
                    self.session.heartbeat.enter("forward and backward")
                    losses += self.graphs.run(batch, context)
        return losses

    def _as_written(self, batch: Batch, context: StepContext) -> Tensor:
        self.session.heartbeat.enter("forward")
        loss = self.task.loss(self.engine.model, batch, context)
        self.session.heartbeat.enter("backward")
        self.engine.backward(loss.total)
        return torch.stack([loss.task, loss.aux])

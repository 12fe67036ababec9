"""The tasks of one optimizer step of a layout, in the order in which its ranks do them.

Every group of ranks does the same at the same time, so tasks are of all groups at once: replicas of an expert are asked
for it equally. A rank that waits for the slowest one of its group waits in a task's `seconds`, over its `mean`.

Shape legend: L MoE layers, E experts, P ranks of an expert group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from swin_moe.config import Config
from swin_moe.planner.arithmetic import macs_of_segments, own_name
from swin_moe.planner.collectives import Collective, bytes_of_channel, collectives_of
from swin_moe.planner.hardware import Hardware
from swin_moe.planner.layouts import Layout
from swin_moe.planner.simulation.events import Task
from swin_moe.planner.simulation.network import Network, Transfer, all_to_all, back, rings
from swin_moe.planner.step_time import predict_time
from swin_moe.planner.trace import Segment
from swin_moe.planner.workload import PADDED, MoEWork, Workload, rows_share

_MOST = 0.9  # of a block's time that is its experts', where the products take longer by themselves


@dataclass(frozen=True)
class Stretch:
    """A segment of a micro-step in seconds."""

    name: str
    backward: bool
    seconds: float


@dataclass
class _Layer:
    """An MoE layer at work."""

    seconds: float  # of its experts' forward products, a rank's even share
    slowest: float  # of all ranks, over an even share
    there: list[Transfer]
    back: list[Transfer]
    shards: list[tuple[str, Transfer]] = field(default_factory=list)


def stretches(
    config: Config, hardware: Hardware, workload: Workload, layout: Layout, segments: Sequence[Segment]
) -> tuple[list[Stretch], float]:
    """Returns (seconds of every segment of a micro-step, of the update), as predict_time has them."""
    found = []
    for segment, macs in zip(segments, macs_of_segments(config, workload, layout, segments)):
        time = predict_time(config, hardware, workload, layout, [segment], [macs])
        found.append(
            Stretch(own_name(segment.name), segment.backward, (time.forward + time.backward) / layout.accumulation)
        )
    return found, predict_time(config, hardware, workload, layout, []).update


def rows_by_rank(config: Config, layout: Layout, shares_E: np.ndarray) -> np.ndarray:
    """Returns what a rank sends to each of its group, in shares of its rows, (P,): less than 1 where some are dropped,
    more where rows are padded."""
    moe = config.model.moe
    if moe.capacity_factor > 0:
        # Of every source rank an expert takes so much (moe/routing.py); a padded dispatcher always sends it all.
        room = moe.capacity_factor / len(shares_E)
        shares_E = np.full_like(shares_E, room) if moe.backend in PADDED else np.minimum(shares_E, room)
    by_place = shares_E.reshape(layout.expert, -1).sum(1)
    return np.repeat(by_place / layout.expert_shard, layout.expert_shard)


class Program:
    """Collects tasks.

    Args:
        shares_LE: Of tokens, by MoE layer and expert.
    """

    def __init__(
        self, config: Config, hardware: Hardware, workload: Workload, layout: Layout, shares_LE: np.ndarray
    ) -> None:
        self.config, self.workload, self.layout = config, workload, layout
        self.network = Network(hardware, layout.world_size)
        self.tasks: list[Task] = []
        self.collectives = list(collectives_of(config, workload, layout))
        rate = hardware.matrix_rate(config.engine.precision)
        self.layers = {work.name: self._layer(work, shares_E, rate) for work, shares_E in zip(workload.moe, shares_LE)}
        self._ready: tuple[int, ...] = ()  # what the next computation waits for

    def build(self, parts: Sequence[Stretch], update: float) -> list[Task]:
        """Returns all tasks of a step. parts: Of one micro-step."""
        for micro in range(self.layout.accumulation):
            last = micro == self.layout.accumulation - 1
            # Stage 2 keeps what it has gathered until the step is over; stage 3 gathers it anew in every pass.
            gathers = list(self._reductions("forward")) if micro == 0 or self.layout.zero == 3 else []
            reduces = list(self._reductions("backward")) if last else []
            for part in parts:
                block = part.name in self._blocks
                if block and (not part.backward or self.layout.zero == 3):
                    for transfer in gathers:
                        self._gather(transfer)
                self._stretch(part)
                if block and part.backward:
                    for transfer in reduces:
                        self._add("reduction", "reduction", (len(self.tasks) - 1,), transfer)
        self._compute("update", update, after=tuple(range(len(self.tasks))))
        for collective in self.collectives:
            if collective.phase == "reduction" and not collective.beside:
                whole = collective.bytes * collective.calls  # a message costs no time of its own
                self._add("reduction", "reduction", (len(self.tasks) - 1,), self._ring(collective, whole))
        return self.tasks

    @property
    def _blocks(self) -> set[str]:
        depths = self.config.model.depths
        return {f"layers.{stage}.blocks.{b}" for stage, depth in enumerate(depths) for b in range(depth)}

    def _stretch(self, part: Stretch) -> None:
        layer = self.layers.get(part.name)
        if layer is None or not layer.there:
            slow = 0.0 if layer is None else min(layer.seconds, _MOST * part.seconds / 3) * (layer.slowest - 1)
            self._compute("compute", part.seconds + slow, mean=part.seconds)
            return
        again = part.backward and self.layout.recompute == "block"
        passes = (2 + again) if part.backward else 1
        experts = min(layer.seconds, _MOST * part.seconds / passes)
        dense = part.seconds - passes * experts
        if not part.backward or again:
            self._compute("compute", dense / (1 + 2 * again))
            self._shards(layer, "all_gather")
            self._experts(layer, experts)
            dense -= dense / (1 + 2 * again)
        if part.backward:
            self._experts(layer, 2 * experts)
            self._shards(layer, "reduce_scatter")
        self._compute("compute", dense)

    def _experts(self, layer: _Layer, seconds: float) -> None:
        """Adds rows to the experts, their products, and rows back, in as many slices as overlap says."""
        slices, before = self.layout.overlap, self._ready
        arrived: list[tuple[int, ...]] = []
        home: tuple[int, ...] = ()
        for i in range(slices + 1):
            if i < slices:
                after = before
                for transfer in layer.there:
                    after = self._add("exchange", "exchange", after, transfer)
                arrived.append(after)
            if i:
                done = self._compute(
                    "compute", seconds * layer.slowest / slices, mean=seconds / slices, after=arrived[i - 1]
                )
                for transfer in layer.back:
                    done = self._add("exchange", "exchange", done, transfer)
                home = done
        self._ready = home

    def _shards(self, layer: _Layer, kind: str) -> None:
        for name, transfer in layer.shards:
            if name == kind:
                self._ready = self._add("exchange", "exchange", self._ready, transfer)

    def _gather(self, transfer: Transfer) -> None:
        """Adds the gathering of a block's parameters, which may begin with the block before."""
        computing = [i for i, task in enumerate(self.tasks) if task.stream == "compute"][-2:-1]
        self._ready = (*self._ready, *self._add("reduction", "reduction", tuple(computing), transfer))

    def _compute(
        self, phase: str, seconds: float, *, mean: float | None = None, after: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        after = self._ready if after is None else after
        self.tasks.append(Task("compute", phase, after, seconds, seconds if mean is None else mean))
        self._ready = (len(self.tasks) - 1,)
        return self._ready

    def _add(self, stream: str, phase: str, after: tuple[int, ...], transfer: Transfer) -> tuple[int, ...]:
        self.tasks.append(Task(stream, phase, after, transfer=transfer))
        return (len(self.tasks) - 1,)

    def _layer(self, work: MoEWork, shares_E: np.ndarray, rate: float) -> _Layer:
        layout, micro = self.layout, self.layout.micro_batch
        rows_P = rows_by_rank(self.config, layout, shares_E)
        share = rows_share(self.config.model.moe)
        seconds = 2 * 2.0 * work.rows * work.dim * work.hidden * micro * share / rate
        layer = _Layer(seconds, float(rows_P.max()) * len(rows_P) / share, [], [])
        if len(rows_P) == 1:
            return layer
        sent_P = rows_P * float(work.rows * work.dim * micro * bytes_of_channel(self.workload, layout))
        sent_P /= layout.overlap
        layer.there = all_to_all(self.network, "rows", sent_P, transport=layout.transport)
        layer.back = [back(t, "rows back") for t in reversed(layer.there)]
        if layout.expert_shard > 1:
            size = 4.0 * work.weights / layout.expert
            for kind in ("all_gather", "reduce_scatter"):
                ring = rings(self.network, "shards of experts", kind, size, ranks=layout.expert_shard, stride=1)
                layer.shards.append((kind, ring))
        return layer

    def _reductions(self, beside: str) -> Iterator[Transfer]:
        """Yields one transfer a block of every reduction that runs beside the blocks."""
        for collective in self.collectives:
            if collective.phase == "reduction" and collective.beside == beside:
                once = collective.bytes / (1 if collective.calls > 1 else self.workload.blocks)
                yield self._ring(collective, once)

    def _ring(self, collective: Collective, size: float) -> Transfer:
        ranks, stride = collective.ranks, collective.stride
        return rings(self.network, "parameters", collective.kind, size, ranks=ranks, stride=stride)

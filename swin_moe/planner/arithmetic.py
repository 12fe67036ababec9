"""Multiply-accumulates of every segment of a micro-step: the network's own counts, laid where they are computed.

A segment is a block, or what lies between two: embedding, merging, head (trace.py). Names of blocks are the network's,
whatever the task wraps it in; a task may run it several times (two views, a momentum network).
"""

from collections import Counter
from collections.abc import Sequence

from swin_moe.config import Config
from swin_moe.planner.layouts import Layout
from swin_moe.planner.trace import Segment
from swin_moe.planner.workload import Workload, rows_share


def macs_of_segments(config: Config, workload: Workload, layout: Layout, segments: Sequence[Segment]) -> list[float]:
    """Returns multiply-accumulates of each segment of a micro-batch: once in forward, twice in backward, where blocks
    that are recomputed add one more."""
    blocks, between, task = _by_place(config, workload)
    runs = Counter(s.backward for s in segments if own_name(s.name) == "layers.0.blocks.0")
    if runs[False] > 1:
        # active_flops is a third of a step's work; what of it the runs of the network are is laid there.
        network = sum(blocks.values()) + sum(between.values())
        task = max(0.0, task - (runs[False] - 1 + 2 * (runs[True] - 1)) * network / 3)
    # Of the blocks of a stage that do the same only some are traced: what follows the last of these follows the stage.
    ends: dict[int, int] = {}
    for name in (own_name(s.name) for s in segments):
        if name.endswith("+") and name != "+":
            ends[_stage(name)] = max(ends.get(_stage(name), 0), _block(name))
    last = len(config.model.depths) - 1
    found = []
    for segment in segments:
        name = own_name(segment.name)
        if name in blocks:
            own = blocks[name] * (2.0 + (layout.recompute == "block") if segment.backward else 1.0)
        elif segment.backward:
            own = 2.0 * (
                between[last] + task if name == "+" else between[_stage(name) - 1] if name[-1:] == "-" else 0.0
            )
        elif not name:
            own = between[-1]
        else:
            stage = _stage(name)
            own = between[stage] * (_block(name) == ends[stage])
            own += task / max(1, runs[False]) * (stage == last and _block(name) == ends[stage])
        found.append(own * layout.micro_batch)
    return found


def _by_place(config: Config, workload: Workload) -> tuple[dict[str, float], dict[int, float], float]:
    """Returns (block -> its own, stage -> of what follows it, -1 = of what comes before all, what a task adds)."""
    share, layers = rows_share(config.model.moe), {layer.name for layer in workload.moe}
    blocks: dict[str, float] = {}
    between = dict.fromkeys(range(-1, len(config.model.depths)), 0.0)
    task, stage = 0.0, -1
    for module, macs in workload.macs:
        words = module.split(".")
        if "blocks" in words:
            name, stage = ".".join(words[:4]), int(words[1])
            routed = words[-1] == "mlp" and name in layers
            blocks[name] = blocks.get(name, 0.0) + macs * (share if routed else 1.0)
        elif module == "task":
            task = macs
        else:
            between[stage] += macs
    return blocks, between, task


def own_name(name: str) -> str:
    """Returns the name of a segment within the network: "encoder.layers.0.blocks.1+" is layers.0.blocks.1+."""
    return name[name.index("layers.") :] if "layers." in name else name


def _stage(name: str) -> int:
    return int(name.split(".")[1])


def _block(name: str) -> int:
    return int(name.rstrip("+-").split(".")[3])

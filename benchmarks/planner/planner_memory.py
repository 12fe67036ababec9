"""Memory of real training steps on CPU ranks beside what the planner says.

    python -m launcher -n 2 -- benchmarks/planner/planner_memory.py [WORD ...]

Runs every case of as many ranks as there are, of those with a WORD in the name if any are given, and prints a table.
Activations are measured by LiveBytes (swin_moe/planner/trace.py) in the third step of a run: storages that operators
return, at their peak, on the rank that holds most. Experts get the rows that the router sends; the planner is told how
many arrive at this rank's experts, and beside it is what it says of an even load. Experts are two layers with a
gradient each, as on a GPU: the CPU's operator for few rows (row_products.py) gives both gradients of weights at once,
so that one of them is counted among activations until it is handed on.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from swin_moe.config import Config
from swin_moe.config.io import load_config
from swin_moe.moe import experts
from swin_moe.parallel.groups import build_groups, init_distributed
from swin_moe.planner.layouts import layout_in
from swin_moe.planner.measured import Measured, measure_step
from swin_moe.planner.memory import Memory, activations_over_time, predict_memory, predict_states
from swin_moe.planner.micro_step import trace_micro_step
from swin_moe.planner.workload import build_workload
from swin_moe.run.session import Session, check_layout, layout_of
from swin_moe.train import Trainer

STEPS = 2  # that are taken before the measured one
_SWIN = (
    "model.name=swin model.img_size=96 model.embed_dim=48 model.depths=[2,2,4,2] model.num_heads=[3,6,12,24] "
    "model.window_size=6 model.num_classes=100 data.global_batch=16"
)
_V2 = _SWIN.replace("name=swin ", "name=swinv2 ") + " model.extra_norm_every=2"
_MLP = _SWIN.replace("name=swin ", "name=swin_mlp ")
_MOE = (
    "model.name=swin_moe model.img_size=96 model.embed_dim=48 model.depths=[2,2,4,2] model.num_heads=[3,6,12,24] "
    "model.window_size=6 model.num_classes=100 data.global_batch=16 model.moe.blocks=[[-1],[-1],[1,3],[1]] "
    "model.moe.num_experts=8 model.moe.capacity_factor=0 model.moe.capacity_scope=rank"
)
_BF16 = " engine.precision=bf16"
_BLOCK = " parallel.recompute=block"
_DEEPSPEED = " engine.name=deepspeed parallel.zero="
_REFERENCE = " model.attention=reference"


@dataclass(frozen=True)
class Case:
    """A config and layout; options as on the command line."""

    name: str
    ranks: int
    options: str


CASES = (
    Case("swin", 1, _SWIN),
    Case("swin bf16, copies of weights", 1, _SWIN + _BF16),
    Case("swin, recomputed", 1, _SWIN + _BLOCK),
    Case("swin, 4 micro-batches", 1, _SWIN + " data.micro_batch=4"),
    Case("swin, averaged weights, SGD", 1, _SWIN + " optim.ema=0.99 optim.name=sgd"),
    Case("swinv2, reference attention", 1, _V2 + _REFERENCE),
    Case("swinv2, attention in turns", 1, _V2 + " model.attention_chunk=16"),
    Case("swin_mlp", 1, _MLP),
    Case("swin_moe", 1, _MOE),
    Case(
        "swin_moe top-2, padded, dropout",
        1,
        _MOE + " model.moe.top_k=2 model.moe.backend=padded model.moe.capacity_factor=1.25 model.moe.dropout=0.1",
    ),
    Case("swin", 2, _SWIN),
    Case("swinv2 bf16", 2, _V2 + _BF16),
    Case("swin ZeRO-1", 2, _SWIN + " parallel.zero=1"),
    Case("swin FairScale OSS", 2, _SWIN + " engine.name=fairscale parallel.zero=1"),
    Case("swinv2 ZeRO-2", 2, _V2 + " parallel.zero=2"),
    Case("swinv2 ZeRO-3, recomputed", 2, _V2 + " parallel.zero=3" + _BLOCK),
    Case("swin_moe, expert 2", 2, _MOE),
    Case("swin_moe bf16, expert 2, 2 micro-batches", 2, _MOE + _BF16 + " data.micro_batch=4"),
    Case("swin_moe ZeRO-1, expert 2, payload bf16", 2, _MOE + " parallel.zero=1 model.moe.payload=bf16"),
    Case("swin DeepSpeed ZeRO-1", 1, _SWIN + _DEEPSPEED + "1"),
    Case("swin DeepSpeed ZeRO-1", 2, _SWIN + _DEEPSPEED + "1"),
    Case("swin DeepSpeed ZeRO-2", 2, _SWIN + _DEEPSPEED + "2"),
    Case("swin DeepSpeed ZeRO-3", 2, _SWIN + _DEEPSPEED + "3"),
    Case("swin DeepSpeed ZeRO-1, 2 micro-batches", 2, _SWIN + _DEEPSPEED + "1 data.micro_batch=4"),
    Case("swin DeepSpeed ZeRO-2, 2 micro-batches", 2, _SWIN + _DEEPSPEED + "2 data.micro_batch=4"),
    Case("swin DeepSpeed ZeRO-3, 2 micro-batches", 2, _SWIN + _DEEPSPEED + "3 data.micro_batch=4"),
    Case("swin DeepSpeed ZeRO-3, recomputed", 2, _SWIN + _DEEPSPEED + "3" + _BLOCK),
    Case("swinv2 DeepSpeed ZeRO-2 bf16", 2, _V2 + _DEEPSPEED + "2" + _BF16),
    Case("swin_moe DeepSpeed ZeRO-1, expert 2", 2, _MOE + _DEEPSPEED + "1"),
    Case("swin_moe DeepSpeed ZeRO-2, expert 2", 2, _MOE + _DEEPSPEED + "2"),
    Case("swin_moe DeepSpeed ZeRO-3, expert 2", 2, _MOE + _DEEPSPEED + "3"),
    Case("swin_moe, expert 4, recomputed", 4, _MOE + _BLOCK),
    Case("swin_moe, 2 experts over 4 ranks", 4, _MOE + " model.moe.num_experts=2"),
    Case("swin_moe ZeRO-1, expert 2", 4, _MOE + " parallel.expert=2 parallel.zero=1"),
    Case("swin ZeRO-3", 4, _SWIN + " parallel.zero=3"),
)


def measure(case: Case, world_size: int) -> tuple[Config, Measured, float]:
    """Returns (config, what this rank holds, rows that arrived in shares of those it sent)."""
    with tempfile.TemporaryDirectory() as directory:
        base = (
            f"data.name=synthetic data.synthetic_samples=64 data.workers=0 run.output={directory} log.tensorboard=false"
        )
        config = load_config("digits_swin_moe", f"{base} model.moe.blocks=[] {case.options}".split())
        check_layout(config, world_size)
        device = torch.device("cpu")
        two_hops = config.model.moe.transport == "hierarchical"
        groups = build_groups(
            *layout_of(config), device, routing_ranks=config.routing_ranks(world_size), two_hops=two_hops
        )
        trainer = Trainer(Session(config, groups, device))
        arrived: list[float] = []
        for step, loaded in enumerate(trainer.loader.batches(0, STEPS + 1)):
            batches = list(loaded)
            context = trainer._context(step, config.data.global_batch)
            if step < STEPS:
                _take(trainer, batches, context)
                continue
            _watch_rows(trainer.engine.local_model, arrived)
            found = measure_step(trainer.engine, trainer.task, batches, context)
        trainer.loader.close()
    return config, found, float(np.mean(arrived)) if arrived else 1.0


def _take(trainer: Trainer, batches: list, context: Any) -> None:
    for index, batch in enumerate(batches):
        with trainer.engine.micro_step(last=index == len(batches) - 1):
            trainer.engine.backward(trainer.task.loss(trainer.engine.model, batch, context).total)
    trainer.engine.measure()
    trainer.engine.step(context.step)


def _watch_rows(model: torch.nn.Module, arrived: list[float]) -> None:
    """Notes for every MoE layer and forward how many rows its experts got, in shares of those the rank sent."""
    from swin_moe.moe import MoELayer

    for module in model.modules():
        if isinstance(module, MoELayer):

            def hook(experts: Any, inputs: tuple, layer: MoELayer = module) -> None:
                if isinstance(inputs[0], torch.Tensor) and layer.stats is not None:
                    arrived.append(len(inputs[0]) / max(1, int(layer.stats.kept.sum())))

            module.experts.register_forward_pre_hook(hook)


def predict(config: Config, world_size: int, rows: float) -> Memory:
    """Returns what the planner says: all gradients, and the most bytes of activations and gathered parameters."""
    layout, workload = layout_in(config, world_size), build_workload(config)
    segments = trace_micro_step(config, layout.degrees, rows, images=layout.micro_batch).at(layout.micro_batch)
    states = predict_states(config, workload, layout)
    if layout.engine == "deepspeed":  # all that comes and goes in a step, with gradients on their way
        most = predict_memory(config, workload, layout, segments, states)
        kept = states.gradients + states.workspace if layout.zero == 3 else 0.0  # between steps, too
        passing = most.activations + most.gathered + most.gradients + most.workspace - kept
        return replace(states, activations=passing)
    peak = activations_over_time(config, workload, layout, segments).max()
    return replace(states, activations=float(peak))


def compare(case: Case, world_size: int) -> dict[str, tuple[float, float]]:
    """Returns class -> (predicted, measured) on the rank that holds most of it."""
    with mock.patch.object(experts, "takes", lambda *_: False):
        config, found, rows = measure(case, world_size)
    said = asdict(predict(config, world_size, rows))
    said["even load"] = predict(config, world_size, 1.0).activations if rows != 1.0 else said["activations"]
    seen = asdict(found) | {"even load": found.activations}
    mine = torch.tensor([[said[key], value] for key, value in seen.items()], dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    if world_size > 1:
        dist.all_gather(everyone, mine)
    else:
        everyone = [mine]
    table = torch.stack(everyone)
    return {name: tuple(table[table[:, i, 1].argmax(), i].tolist()) for i, name in enumerate(seen)}


def main(words: list[str]) -> None:
    """Prints the table of the cases of this world."""
    torch.set_num_threads(1)
    rank, world_size = init_distributed(torch.device("cpu"))
    if rank == 0:
        print("| ranks | case | parameters | gradients | optimizer | activations, MB | error | of an even load |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        if case.ranks != world_size or (words and not any(word in case.name for word in words)):
            continue
        found = compare(case, world_size)
        if rank == 0:
            exact = [_exact(*found[name]) for name in ("parameters", "gradients", "optimizer")]
            said, seen = found["activations"]
            even = found["even load"][0]
            errors = " | ".join(f"{100 * (value / seen - 1):+.2f} %" for value in (said, even))
            print(f"| {world_size} | {case.name} | {' | '.join(exact)} | {seen / 1e6:.2f} | {errors} |", flush=True)
    if world_size > 1:
        dist.destroy_process_group()


def _exact(said: float, seen: float) -> str:
    return f"{seen / 1e6:.2f} MB" if said == seen else f"{seen:.0f}, said {said:.0f}"


if __name__ == "__main__":
    from launcher import mpi

    mpi.bootstrap()
    main(sys.argv[1:])

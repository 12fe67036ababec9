"""`experts SRC DST --duplicate|--split|--merge|--prune N`: another number of experts; routers and moments follow.

    --duplicate N   copies of each expert. Copies share the score of their router row, so each gate is 1 / c of it for c
                    copies. With k = 1 fc2 is multiplied by c: the same function. With k > 1, top_k becomes k c: the
                    same function too. By load: the busier an expert, the more copies: another function.
    --split N       c = N / E new experts from each: copies, of which each keeps another c-th of the hidden units; fc2's
                    rows of the others are zero, free to learn. top_k becomes k c, fc2 is multiplied by c: the same
                    function.
    --merge N       means of neighbours, E / N at a time, weighted by load where it is given: another function.
    --prune N       the N busiest of each layer stay: another function.

"The same function" holds for capacity by need and without gate noise, for both routers; not where k = 1 becomes more
with model.moe.normalize_gate, which normalizes only k > 1. Both networks are run on random images to check it.

Shape legend: E experts before, N after, c copies of one, H hidden channels, k choices per token.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoint_tools.files.floats import WRITABLE, decode, encode
from checkpoint_tools.files.recorded_loads import expert_loads
from checkpoint_tools.formats import open_source
from checkpoint_tools.sources.base import Options, Source, split_kind
from checkpoint_tools.sources.derived import Derived, DerivedSource, Fill, copied, scale
from checkpoint_tools.verbs.arguments import add_format_argument, add_output_arguments
from checkpoint_tools.verbs.convert import write_or_plan
from checkpoint_tools.verbs.same_function import report_difference
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.layout import Chunk

OPERATIONS = ("duplicate", "split", "merge", "prune")
_ROUTER_ROWS = ("router.weight", "router.sim_matrix")  # (E, channels), (channels, E)
_ROUTER_REST = ("router.temperature", "router.projector.weight", "router.projector.bias")
_ELEMENTS = 1 << 20  # of a matrix of routers that are read at once


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add = parser.add_argument
    add("source", type=Path, help="a checkpoint with experts, of any format")
    add("destination", type=Path, help="the native checkpoint to write; nothing may be there yet")
    group = parser.add_mutually_exclusive_group(required=True)
    texts = ("copies of each", "each in several, sharing its hidden units", "means of neighbours", "the busiest only")
    for operation, text in zip(OPERATIONS, texts):
        group.add_argument(f"--{operation}", type=int, metavar="N", help=f"{text}, until there are N")
    add("--load", type=Path, metavar="FILE", help="tokens per expert: a run's metrics.jsonl, or JSON {layer: [...]}")
    add("--no-check", action="store_true", help="do not run both networks on random images")
    add_format_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Writes the network with another number of experts, and says whether it computes the same."""
    operation = next(name for name in OPERATIONS if getattr(arguments, name) is not None)
    with open_source(arguments.source, options, arguments.format) as source:
        loads = expert_loads(arguments.load) if arguments.load else {}
        change = Change(source, operation, getattr(arguments, operation), loads)
        write_or_plan(change.source(), arguments.destination, options, dry_run=arguments.dry_run)
        if not arguments.dry_run and not arguments.no_check:
            report_difference(
                source, arguments.destination, options, exact=change.is_exact, config=change.by_need(source.config)
            )
    return 0


class Origin(NamedTuple):
    """What a new expert is made of."""

    experts: tuple[int, ...]  # of the old ones; several are averaged
    weights: tuple[float, ...]
    share: tuple[int, int] = (0, 1)  # which of how many shares of the hidden units it keeps


class Change:
    """What becomes of each tensor.

    Args:
        loads: Layer (layers.2.blocks.1) -> tokens per expert.

    Raises:
        CheckpointError: The source has no experts, or its config does not tell top_k, or its H cannot be shared.
        ValueError: A number of experts that the operation cannot make, or loads that are missing.
    """

    def __init__(self, source: Source, operation: str, count: int, loads: Mapping[str, Sequence[float]]) -> None:
        self.base, self.operation, self.count = source, operation, count
        layers = {
            name.rpartition(".mlp.")[0]: tensor.shape
            for name, tensor in source.tensors.items()
            if name.endswith(".experts.fc1_weight") and "/" not in name
        }
        if not layers:
            raise CheckpointError(f"{source.path}: has no experts; `upcycle` makes them from a dense network")
        self.moe = source.config.get("model", {}).get("moe", {})
        if "top_k" not in self.moe:
            raise CheckpointError(f"{source.path}: does not say its model.moe.top_k (no config); convert it with one")
        for key, only in (("choice", "token"), ("scores", "softmax"), ("group_limit", 0)):
            if self.moe.get(key, only) != only:
                raise CheckpointError(
                    f"{source.path}: model.moe.{key}={self.moe[key]}: experts are changed only where it is {only}"
                )
        self.before = next(iter(layers.values()))[0]
        self.top_k = self.moe["top_k"]
        self.origins = {layer: self._origins(layer, shape[0], loads) for layer, shape in layers.items()}
        copies = count // self.before
        uniform = operation == "split" or (operation == "duplicate" and not loads)
        more = operation == "split" or (operation == "duplicate" and self.top_k > 1 and uniform)
        self.new_top_k = self.top_k * copies if more else min(self.top_k, count)
        # Sum over an expert's chosen copies: gate / c each. fc2 x c makes one copy, or one share each, the whole.
        self.factor = float(copies) if uniform and (operation == "split" or self.top_k == 1) else 1.0
        # Gates of k = 1 are not normalized, those of its c copies would be.
        normalized = bool(self.moe.get("normalize_gate")) and self.top_k == 1 < self.new_top_k
        self.is_exact = uniform and not normalized
        for layer, shape in layers.items():
            if operation == "split" and shape[1] % copies:
                raise CheckpointError(f"{source.path}: {layer}: {shape[1]} hidden channels are no multiple of {copies}")

    def _origins(self, layer: str, before: int, loads: Mapping[str, Sequence[float]]) -> list[Origin]:
        count, load = self.count, loads.get(layer)
        if loads and (load is None or len(load) != before):
            found = len(load) if load else "no"
            raise ValueError(f"--load has {found} numbers for {layer}, which has {before} experts")
        if self.operation in ("duplicate", "split"):
            if count < before or (count % before and (self.operation == "split" or load is None)):
                raise ValueError(f"--{self.operation} must be a multiple of the {before} experts, got {count}")
            copies = share_copies(load, count) if load is not None else [count // before] * before
            split = self.operation == "split"
            return [Origin((e,), (1.0,), (c, n) if split else (0, 1)) for e, n in enumerate(copies) for c in range(n)]
        if not 1 <= count <= before:
            raise ValueError(f"--{self.operation} must be in [1, {before}], got {count}")
        if self.operation == "prune":
            if load is None:
                raise ValueError("--prune needs --load: which experts are the busiest")
            kept = sorted(sorted(range(before), key=lambda e: (-load[e], e))[:count])
            return [Origin((e,), (1.0,)) for e in kept]
        if before % count:
            raise ValueError(f"--merge must divide the {before} experts, got {count}")
        size = before // count
        groups = [tuple(range(start, start + size)) for start in range(0, before, size)]
        return [Origin(group, merge_weights(group, load)) for group in groups]

    def source(self) -> Source:
        """Returns the network with the new experts."""
        tensors: dict[str, Derived] = {}
        for name in self.base.tensors:
            parameter = split_kind(name)[1]
            layer, _, leaf = parameter.partition(".mlp.")
            if layer in self.origins and leaf.startswith("router.") and leaf not in _ROUTER_ROWS + _ROUTER_REST:
                raise CheckpointError(
                    f"{self.base.path}: tensor {name} belongs to a router that this verb does not know; it knows those "
                    f"of {', '.join(_ROUTER_ROWS + _ROUTER_REST)}"
                )
            if layer in self.origins and (is_expert_tensor(parameter) or leaf in _ROUTER_ROWS):
                tensors[name] = self._changed(name, layer, leaf)
            else:
                tensors[name] = copied(self.base, name)
        moe = {**self.moe, "num_experts": self.count, "top_k": self.new_top_k}
        config = {**self.base.config, "model": {**self.base.config["model"], "moe": moe}}
        state = {key: value for key, value in self.base.state.items() if key != "official"}
        origins = {layer: [list(map(list, origin)) for origin in made] for layer, made in self.origins.items()}
        recipe = {"verb": "experts", "operation": self.operation, "experts": self.count, "origins": origins}
        return DerivedSource(self.base, tensors, step=self.base.step, state=state, config=config, recipe=recipe)

    def by_need(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a config that evaluates without dropping tokens, to compare functions by."""
        moe = {**config["model"]["moe"], "eval_capacity_factor": 0.0}
        return {**config, "model": {**config["model"], "moe": moe}}

    def _changed(self, name: str, layer: str, leaf: str) -> Derived:
        shape, dtype = self.base.tensors[name]
        if dtype not in WRITABLE:
            raise CheckpointError(f"{self.base.path}: tensor {name}: {dtype} experts cannot be changed")
        kind, origins = split_kind(name)[0], self.origins[layer]
        if leaf == "router.sim_matrix":
            return Derived((shape[0], self.count), dtype, self._columns(name, origins), name)
        factor = self._factor(kind, leaf)

        def fill(box: Chunk, out: np.ndarray) -> None:
            rest = box.offset[1:], box.size[1:]
            for row in range(box.size[0]):
                origin, part = origins[box.offset[0] + row], out[row : row + 1]
                _average(
                    lambda e, to: self.base.read(name, Chunk((e, *rest[0]), (1, *rest[1])), to), dtype, origin, part
                )
                scale(part, dtype, factor)
                if leaf == "experts.fc2_weight" and origin.share[1] > 1:
                    _keep_share(part, box, shape[1], origin.share)

        return Derived((self.count, *shape[1:]), dtype, fill, name)

    def _columns(self, name: str, origins: Sequence[Origin]) -> Fill:
        """Returns what fills a matrix (channels, N): rows of the old one are read whole, once for all columns."""
        (_, before), dtype = self.base.tensors[name]

        def fill(box: Chunk, out: np.ndarray) -> None:
            step = max(1, _ELEMENTS // before)
            for start in range(0, box.size[0], step):
                part = out[start : start + step]
                old = np.empty((len(part), before), out.dtype)
                self.base.read(name, Chunk((box.offset[0] + start, 0), old.shape), old)
                for column in range(box.size[1]):
                    origin = origins[box.offset[1] + column]
                    _average(partial(_copy_column, old), dtype, origin, part[:, column : column + 1])

        return fill

    def _factor(self, kind: str, leaf: str) -> float:
        """Returns what a tensor is multiplied by; the second bias of a split expert is shared, and stays as it is."""
        if not leaf.startswith("experts.fc2") or self.factor == 1.0:
            return 1.0
        if leaf == "experts.fc2_bias" and self.operation == "split":
            return 1.0
        return {"exp_avg": 1 / self.factor, "momentum_buffer": 1 / self.factor, "exp_avg_sq": self.factor**-2}.get(
            kind, self.factor
        )


def _average(read: Callable[[int, np.ndarray], None], dtype: str, origin: Origin, out: np.ndarray) -> None:
    """Fills `out` with the weighted mean of what `read` gives for each of the old experts."""
    if len(origin.experts) == 1:
        read(origin.experts[0], out)
        return
    total, one = np.zeros(out.shape, np.float64), np.empty(out.shape, out.dtype)
    for expert, weight in zip(origin.experts, origin.weights):
        read(expert, one)
        total += weight * decode(one, dtype)
    encode(total, dtype, out)


def _copy_column(matrix: np.ndarray, column: int, out: np.ndarray) -> None:
    np.copyto(out, matrix[:, column : column + 1])


def _keep_share(part: np.ndarray, box: Chunk, hidden: int, share: tuple[int, int]) -> None:
    """Sets the rows (1, h, D) of hidden units that belong to other shares to zero."""
    number, count = share
    row = np.arange(box.offset[1], box.offset[1] + box.size[1])
    part[:, row // (hidden // count) != number] = 0


def share_copies(load: Sequence[float], count: int) -> list[int]:
    """Returns how many of `count` copies each expert gets: one each, the rest by load (largest remainders)."""
    spare, total = count - len(load), sum(load)
    ideal = [spare * value / total if total else spare / len(load) for value in load]
    copies = [1 + int(value) for value in ideal]
    order = sorted(range(len(load)), key=lambda e: (int(ideal[e]) - ideal[e], e))
    for expert in order[: count - sum(copies)]:
        copies[expert] += 1
    return copies


def merge_weights(group: Sequence[int], load: Sequence[float] | None) -> tuple[float, ...]:
    """Returns the weights of a mean of experts: their loads, or equal ones without."""
    values = [1.0 if load is None else float(load[expert]) for expert in group]
    total = sum(values)
    return tuple(value / total for value in values) if total else tuple(1 / len(group) for _ in group)

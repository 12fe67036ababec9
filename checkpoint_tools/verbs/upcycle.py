"""`upcycle DENSE DST`: a dense network's feed-forward blocks become experts (arXiv:2212.05055).

Every expert is a copy f of the dense block, so the layer computes (sum of the k gates) * f(x), and fc2 times 1 / (sum
of the gates) gives f(x) back. That sum is known, so the new network is the dense one, in these cases:

    gates normalized, k >= 2      1, for any router
    k = number of experts E       1, for any router
    router weights all zero       k / E: every score is 1 / E

with capacity by need (no token dropped) and in evaluation (no gate noise). With --router-std > 0 and none of the first
two, or with --reinit > 0, the networks differ (SwinV2's only little by the router: the norm behind a branch undoes any
scale). Both are run on random images in every case, and the difference is told.
"Is" means up to rounding; the factor itself is exact where it is a power of two.

Shape legend: E experts, H hidden channels, D model channels, k choices per token.
"""

import argparse
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_tools.files.floats import encode
from checkpoint_tools.formats import open_source
from checkpoint_tools.formats.infer import infer_model, merge_model
from checkpoint_tools.sources.base import Options, Source, split_kind
from checkpoint_tools.sources.derived import Derived, DerivedSource, copied, from_array, scale, zeros
from checkpoint_tools.verbs.arguments import add_format_argument, add_output_arguments, add_settings_argument
from checkpoint_tools.verbs.convert import write_or_plan
from checkpoint_tools.verbs.same_function import report_difference
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.layout import Chunk
from swin_moe.names.official import is_dense_task

_MLP = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)")
POLICIES = ("zero", "copy", "none")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add = parser.add_argument
    add("source", type=Path, help="a dense checkpoint of any format")
    add("destination", type=Path, help="the native checkpoint to write; nothing may be there yet")
    add("--experts", type=int, required=True, metavar="E", help="experts of every MoE block")
    add(
        "--blocks",
        default="",
        metavar="JSON",
        help="per stage, the blocks that get experts: [[-1],[-1],[1,3,5],[1]] "
        "(default: the odd ones of the last two stages, as Swin-MoE)",
    )
    add("--top-k", type=int, default=1, help="experts per token (default 1)")
    add("--normalize-gate", action="store_true", help="the k gates of a token sum to 1 (k >= 2)")
    add("--router-std", type=float, default=0.0, help="standard deviation of the router's weights (default 0)")
    add("--reinit", type=float, default=0.0, metavar="FRACTION", help="hidden units of each expert that start anew")
    add("--optimizer", choices=POLICIES, default="zero", help="moments: zero and step 0 (default), copied, or none")
    add("--seed", type=int, default=0, help="of everything drawn here (default 0)")
    add("--no-check", action="store_true", help="do not run both networks on random images")
    add_format_argument(parser)
    add_settings_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace, options: Options) -> int:
    """Writes the network with experts, and says whether it computes what the dense one does."""
    with open_source(arguments.source, options, arguments.format) as dense:
        upcycling = Upcycling(dense, arguments)
        source = upcycling.source()
        write_or_plan(source, arguments.destination, options, dry_run=arguments.dry_run)
        if not arguments.dry_run and not arguments.no_check:
            config = upcycling.dense_config
            report_difference(dense, arguments.destination, options, exact=upcycling.is_exact, config=config)
    return 0


class Upcycling:
    """What becomes of each tensor of a dense network.

    Raises:
        CheckpointError: The source has experts already, or not the blocks asked for.
        ValueError: An argument out of range.
    """

    def __init__(self, dense: Source, arguments: argparse.Namespace) -> None:
        self.dense, self.arguments = dense, arguments
        check(arguments)
        shapes = {name: tensor.shape for name, tensor in dense.tensors.items() if split_kind(name)[0] == "weight"}
        if is_dense_task(shapes):
            raise CheckpointError(
                f"{dense.path}: is of a detector or segmentor; upcycle the classifier, and begin with that "
                f"(checkpoint.init)"
            )
        if any(is_expert_tensor(name) for name in shapes):
            raise CheckpointError(f"{dense.path}: has experts already; `experts` changes their number")
        self.dense_config = merge_model(dense.config, infer_model(dense.path, shapes))
        depths = self.dense_config["model"].get("depths", [])
        self.blocks = parse_blocks(arguments.blocks, depths)
        self.experts, self.top_k = arguments.experts, arguments.top_k
        normalized = arguments.normalize_gate and self.top_k >= 2
        self.factor = 1.0 if normalized else self.experts / self.top_k  # of fc2
        certain = normalized or self.top_k == self.experts or arguments.router_std == 0
        self.is_exact = certain and arguments.reinit == 0

    def source(self) -> Source:
        """Returns the network with experts."""
        tensors: dict[str, Derived] = {}
        for name in self.dense.tensors:
            kind, parameter = split_kind(name)
            if kind != "weight" and self._drops(kind):
                continue
            match = _MLP.fullmatch(parameter)
            if match and int(match[2]) in self.blocks[int(match[1])]:
                tensors |= dict(self._expert(name, kind, match))
            else:
                tensors[name] = copied(self.dense, name)
        tensors |= dict(self._routers())
        if self.arguments.optimizer == "zero":
            tensors |= {
                f"optim.{kind}/{name}": zeros(made.shape, made.dtype)
                for name, made in tensors.items()
                for kind in ("exp_avg", "exp_avg_sq")
                if "/" not in name and not self._frozen(name)
            }
        state, step = self._state()
        recipe = {"verb": "upcycle", **{k: v for k, v in vars(self.arguments).items() if k in _RECIPE}}
        return DerivedSource(self.dense, tensors, step=step, state=state, config=self._config(), recipe=recipe)

    def _drops(self, kind: str) -> bool:
        return self.arguments.optimizer != "copy" or kind not in ("exp_avg", "exp_avg_sq", "momentum_buffer")

    def _frozen(self, name: str) -> bool:
        return name.endswith(".experts.fc2_bias") and not self.dense_config["model"].get("mlp_fc2_bias", True)

    def _factor(self, kind: str, layer: str) -> float:
        """Returns what a value is multiplied by: a gradient of s * w is 1 / s times that of w."""
        if layer != "fc2":
            return 1.0
        return {"exp_avg": 1 / self.factor, "exp_avg_sq": self.factor**-2, "momentum_buffer": 1 / self.factor}.get(
            kind, self.factor
        )

    def _expert(self, name: str, kind: str, match: re.Match) -> Iterator[tuple[str, Derived]]:
        """Yields the experts' tensor that a dense one becomes."""
        stage, block, layer, leaf = match.groups()
        (*shape,), dtype = self.dense.tensors[name]
        prefix, _, _ = name.rpartition(f".mlp.{layer}.{leaf}")
        target = f"{prefix}.mlp.experts.{layer}_{leaf}"
        turned = layer == "fc2" and leaf == "weight"  # (D, H) there, (H, D) here
        own = tuple(reversed(shape)) if turned else tuple(shape)
        factor, anew = self._factor(kind, layer), self.arguments.reinit
        hidden = own[0] if not (layer == "fc2" and leaf == "bias") else 0

        def fill(box: Chunk, out: np.ndarray) -> None:
            (first, count), inner = (box.offset[0], box.size[0]), Chunk(box.offset[1:], box.size[1:])
            view = out[0].T if turned else out[0]
            source = Chunk(inner.offset[::-1], inner.size[::-1]) if turned else inner
            self.dense.read(name, source, view)
            scale(out[0], dtype, factor)
            for expert in range(1, count):
                out[expert] = out[0]
            for expert in range(count) if anew and hidden else ():
                self._reinit(out[expert], dtype, target, first + expert, inner, hidden, kind)

        yield target, Derived((self.experts, *own), dtype, fill, name)
        if layer == "fc2" and leaf == "weight" and f"{prefix}.mlp.fc2.bias" not in self.dense.tensors:
            bias = f"{prefix}.mlp.experts.fc2_bias"
            if kind == "weight":
                yield bias, zeros((self.experts, shape[0]), dtype)

    def _reinit(
        self, out: np.ndarray, dtype: str, target: str, expert: int, box: Chunk, hidden: int, kind: str
    ) -> None:
        """Draws the rows of an expert's hidden units that start anew: normal weights, zero biases and moments."""
        block = split_kind(target)[1].partition(".experts.")[0]
        chosen = generator(self.arguments.seed, block, expert).permutation(hidden)
        rows = set(chosen[: round(self.arguments.reinit * hidden)].tolist())
        std = self.dense_config["model"].get("init_std", 0.02)
        for row in range(box.size[0]):
            number = box.offset[0] + row
            if number not in rows:
                continue
            if kind != "weight" or out.ndim == 1:
                out[row] = 0
                continue
            values = generator(self.arguments.seed, target, expert, number).standard_normal(box.offset[1] + box.size[1])
            factor = self.factor if target.endswith("fc2_weight") else 1.0
            encode(values[box.offset[1] :] * std * factor, dtype, out[row])

    def _routers(self) -> Iterator[tuple[str, Derived]]:
        kinds = sorted({split_kind(name)[0] for name in self.dense.tensors if name.startswith("optim.")})
        for stage, blocks in enumerate(self.blocks):
            for block in blocks:
                prefix = f"layers.{stage}.blocks.{block}.mlp"
                name = f"{prefix}.fc1.weight"
                if name not in self.dense.tensors:
                    raise CheckpointError(f"{self.dense.path}: holds no tensor {name}, which is to become experts")
                (_, channels), dtype = self.dense.tensors[name]
                draw = generator(self.arguments.seed, f"{prefix}.router.weight", 0)
                values = draw.standard_normal((self.experts, channels)) * self.arguments.router_std
                yield f"{prefix}.router.weight", from_array(values, dtype)
                if self.arguments.optimizer == "copy":
                    for kind in kinds:
                        yield f"optim.{kind}/{prefix}.router.weight", zeros((self.experts, channels), dtype)

    def _config(self) -> dict[str, Any]:
        model = dict(self.dense_config["model"])
        moe = {
            **model.get("moe", {}),
            "num_experts": self.experts,
            "top_k": self.top_k,
            "router": "linear",
            "choice": "token",
            "scores": "softmax",
            "group_limit": 0,
            "shared_experts": 0,
            "normalize_gate": bool(self.arguments.normalize_gate),
            "eval_capacity_factor": 0.0,  # by need: a dropped token has no feed-forward at all
            "blocks": [blocks or [-1] for blocks in self.blocks],
        }
        return {**self.dense_config, "model": {**model, "moe": moe}}

    def _state(self) -> tuple[dict[str, Any], int]:
        """Returns state and step: those of the dense run where its moments are kept, else those of a fresh one."""
        if self.arguments.optimizer == "copy":
            return {k: v for k, v in self.dense.state.items() if k != "official"}, self.dense.step
        batch = self.dense_config.get("data", {}).get("global_batch")
        if self.arguments.optimizer == "none" or not batch:
            return {}, 0
        progress = {"step": 0, "samples": 0, "best": None, "skipped": 0, "global_batch": batch}
        engine = {"updates": 0, "loss_scale": {"value": 1.0, "good_steps": 0}, "optimizer": "adamw"}
        return {"progress": progress, "engine": engine, "seed": self.arguments.seed}, 0


_RECIPE = (
    "experts",
    "blocks",
    "top_k",
    "normalize_gate",
    "router_std",
    "reinit",
    "optimizer",
    "seed",
)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an argument out of range."""
    if not 1 <= arguments.top_k <= arguments.experts:
        raise ValueError(f"--top-k must be in [1, {arguments.experts}], got {arguments.top_k}")
    if arguments.normalize_gate and arguments.top_k < 2:
        raise ValueError("--normalize-gate has no effect with --top-k 1: a single gate is not normalized")
    if not 0 <= arguments.reinit <= 1 or not 0 <= arguments.router_std < float("inf"):
        raise ValueError(
            f"--reinit must be in [0, 1] and --router-std >= 0, got {arguments.reinit} and {arguments.router_std}"
        )


def parse_blocks(text: str, depths: list[int]) -> list[list[int]]:
    """Returns the blocks with experts of each stage; the default is Swin-MoE's: odd ones of the last two stages.

    Raises:
        ValueError: No list of lists of block numbers that exist.
    """
    if not text:
        last = max(0, len(depths) - 2)
        return [[b for b in range(1, depth, 2) if stage >= last] for stage, depth in enumerate(depths)]
    try:
        blocks = json.loads(text)
        blocks = [[b for b in stage if b != -1] for stage in blocks]
        valid = len(blocks) == len(depths) and all(
            type(b) is int and 0 <= b < depth for stage, depth in zip(blocks, depths) for b in stage
        )
    except (ValueError, TypeError):
        valid = False
    if not valid or not any(blocks):
        raise ValueError(f"--blocks must be a list of block numbers for each of the depths {depths}, got {text!r}")
    return blocks


def generator(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """Returns what values of a tensor are drawn from: a function of seed, name and numbers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), *numbers])))

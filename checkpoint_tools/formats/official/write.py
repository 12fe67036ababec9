"""Any source as official files: what each rank's file holds, in the official order, with the official buffers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoint_tools.files.torch_writer import NewTensor, constant
from checkpoint_tools.formats.geometry import check_geometry
from checkpoint_tools.formats.infer import given_sizes, infer_model, merge_model
from checkpoint_tools.formats.official.expert_files import Spread, expert_kind, local_box, padded_share
from checkpoint_tools.formats.official.layout import (
    frozen_bias,
    in_module_order,
    official_buffers,
    plan_groups,
)
from checkpoint_tools.formats.official.state import KEPT, with_ranks
from checkpoint_tools.formats.rules import TO_OFFICIAL, Rule, from_ours
from checkpoint_tools.sources.base import Options, Source, split_kind
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.config.variants import VARIANTS
from swin_moe.layout import Chunk
from swin_moe.names.official import DENSE

_BEYOND = (".mlp.shared.", ".router.balance.")
_GROUP = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}


class OfficialContent:
    """The files that hold a source officially; `model` and `training` give the content of each.

    Args:
        source: What to write.
        world: Rank files that experts are spread over.
        prefix: "encoder." for SimMIM.
        optimizer: Whether its state is written where there is any.
        buffers: Whether masks, indices, tables and numbers of experts are.

    Raises:
        CheckpointError: Rank files cannot hold this layout, the image size or window is unknown, or the official code
            cannot run the network.
    """

    def __init__(
        self,
        source: Source,
        options: Options,
        *,
        world: int = 1,
        rules: tuple[Rule, ...] = TO_OFFICIAL,
        prefix: str = "",
        optimizer: bool = True,
        buffers: bool = True,
    ) -> None:
        self.source, self.world, self.rules, self.prefix = source, world, rules, prefix
        kinds = {split_kind(name)[0] for name in source.tensors if name.startswith("optim.")}
        self.kinds = sorted(kinds) if optimizer else []  # of optimizer state: exp_avg, exp_avg_sq, ...
        self.names = _weights(source, options)
        shapes = {name: source.tensors[name].shape for name in self.names}
        if not prefix and rules and any(name.startswith("encoder.") for name in shapes):
            raise CheckpointError(f"{source.path}: is a SimMIM pre-training checkpoint; write it with --to simmim")
        if rules and any(name.startswith(DENSE) for name in shapes):
            raise CheckpointError(f"{source.path}: is of a detector or segmentor; write it with --to dense")
        beyond = next((name for name in shapes if any(part in name for part in _BEYOND)), None)
        beyond = beyond or next((n for n in shapes if ".mlp.router." in n and from_ours(n, rules) == [n]), None)
        if beyond is not None and rules:
            raise CheckpointError(f"{source.path}: tensor {beyond}: the official network has no such thing")
        inferred = infer_model(source.path, {name.removeprefix("encoder."): shape for name, shape in shapes.items()})
        self.network = merge_model(source.config, inferred).get("model", {})
        self.network |= given_sizes(options.extra)
        self.spreads = {
            name.rpartition(".experts.")[0]: Spread(shape[0], world)
            for name, shape in shapes.items()
            if name.endswith(".experts.fc1_weight")
        }
        for prefix_, spread in self.spreads.items():
            spread.check(source.path)
            hidden = shapes[f"{prefix_}.experts.fc1_weight"][1]
            if hidden % spread.shards:
                raise CheckpointError(
                    f"{source.path}: {prefix_}: {hidden} hidden channels of an expert cannot be shared evenly by "
                    f"{spread.shards} ranks, as Tutel needs"
                )
        counts = options.extra.get("counts", "yes") if buffers else "no"
        if counts not in ("yes", "no"):
            raise CheckpointError(f"--set counts must be yes or no, got {counts!r}")
        self.has_counts = counts == "yes"
        self.buffers = self._buffers() if buffers else {}

    def _buffers(self) -> dict[str, NewTensor]:
        missing = [key for key in ("img_size", "window_size") if key not in self.network]
        variant = VARIANTS.get(self.network.get("name", ""))
        if missing and (variant is None or variant.mixer == "window"):
            raise CheckpointError(
                f"{self.source.path}: does not tell {' and '.join(missing)}, which the official buffers depend on; "
                f"give {' '.join(f'--set {key}=N' for key in missing)}"
            )
        kinds = {"int64": "I64", "float32": "F32"}
        check_geometry(self.source.path, self.network, "official")
        arrays = official_buffers(self.network)
        buffers = {f"{self.prefix}{n}": constant(a, kinds[a.dtype.name]) for n, a in arrays.items()}
        if self.has_counts:
            for layer, spread in self.spreads.items():
                buffers[f"{self.prefix}{layer}._moe_layer._num_global_experts"] = constant(
                    np.array(spread.experts, np.int64), "I64"
                )
        return buffers

    def model(self, rank: int) -> dict[str, NewTensor]:
        """Returns the local model of a rank, as its state_dict() lists it."""
        tensors = dict(self.buffers)
        for name in self.names:
            tensors[self.official(name)] = self.tensor(name, rank)
        return {name: tensors[name] for name in in_module_order(tensors)}

    def official(self, name: str) -> str:
        """Returns the official name of one of our parameters."""
        (found,) = from_ours(name, self.rules)
        return found

    def tensor(self, name: str, rank: int) -> NewTensor:
        """Returns a rank's part of one of our tensors: an expert tensor's box, with Tutel's padding, or all of it."""
        shape, dtype = self.source.tensors[name]
        if not is_expert_tensor(name):
            return NewTensor(shape, dtype, lambda box, out: self.source.read(name, box, out))
        spread = self.spreads[split_kind(name)[1].rpartition(".experts.")[0]]
        held = local_box(spread, rank, expert_kind(name), shape)
        local = (spread.local, padded_share(spread, shape[1]), *shape[2:])

        def fill(box: Chunk, destination: np.ndarray) -> None:
            inner = box.overlap(Chunk.whole(held.size))
            if inner is None or inner != box:
                destination[...] = 0
            if inner is not None:
                place = Chunk(tuple(a + b for a, b in zip(inner.offset, held.offset)), inner.size)
                self.source.read(name, place, destination[(*inner.within(box), ...)])

        return NewTensor(local, dtype, fill)

    def training(self, rank: int) -> dict[str, Any]:
        """Returns what a rank's file holds beside its model; {} where the source has no optimizer state."""
        if not self.kinds:
            return {}
        kept = dict(self.source.state.get("official") or {})
        engine = self.source.state.get("engine") or {}
        if "scaler" not in kept and engine.get("loss_scale"):
            scale = engine["loss_scale"]
            kept["scaler"] = {
                "scale": scale["value"],
                "growth_factor": 2.0,
                "backoff_factor": 0.5,
                "growth_interval": 2000,
                "_growth_tracker": scale["good_steps"],
            }
        missing = {"lr_scheduler": {}, "max_accuracy": 0.0, "epoch": 0}
        known = {key: kept.get(key, missing.get(key)) for key in KEPT if key in kept or key in missing}
        config = {}
        if "config" in kept:
            config = {"config": with_ranks(kept["config"], self.source.config, self.world)}
        return {"optimizer": self._optimizer(rank, kept.get("param_groups")), **known, **config}

    def _optimizer(self, rank: int, saved: Any) -> dict[str, Any]:
        kinds = self.kinds
        ours = {
            self.official(name): name
            for name in self.names
            if any(f"optim.{kind}/{name}" in self.source.tensors for kind in kinds)
        }
        order = in_module_order(ours)
        shapes = {name: self.source.tensors[ours[name]].shape for name in order}
        saved = saved if isinstance(saved, list) and saved else [{}, {"weight_decay": 0.0}]
        layered = all("group_name" in group for group in saved)
        groups = list(plan_groups(shapes, layered=layered).values())
        if len(saved) == 1:
            groups = [order]
        if len(groups) != len(saved):
            raise CheckpointError(f"{self.source.path}: its parameter groups do not fit its parameters")
        step = constant(np.array(self.source.step, np.float32), "F32")
        state, result, number = {}, [], 0
        for names, options in zip(groups, saved):
            numbers = list(range(number, number + len(names)))
            number += len(names)
            for index, name in zip(numbers, names):
                moments = {k: self.tensor(f"optim.{k}/{ours[name]}", rank) for k in kinds}
                state[index] = moments if self.source.step_unknown else {"step": step, **moments}
            result.append({**_group_options(self.source.config, options), "params": numbers})
        return {"state": state, "param_groups": result}

    def trained_experts(self, rank: int) -> set[str]:
        """Returns the official names of what a rank's file of the final form holds: experts that are trained."""
        frozen = not self.network.get("mlp_fc2_bias", True)
        names = {self.official(name) for name in self.names if is_expert_tensor(name)}
        return {name for name in names if not (frozen and frozen_bias(name))}


def _weights(source: Source, options: Options) -> list[str]:
    """Returns the parameters of a source; what official files cannot hold is reported."""
    kinds = {split_kind(name)[0] for name in source.tensors}
    lost = sorted(kind for kind in kinds if kind in ("ema", "master"))
    if lost:
        options.report(f"{source.path}: official files hold no {' and no '.join(lost)} tensors: left out")
    names = [name for name in source.tensors if split_kind(name)[0] == "weight"]
    if not names:
        raise CheckpointError(f"{source.path}: holds no parameters")
    return names


def _group_options(config: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of an optimizer group: as they were in an official file, else from our config."""
    if "betas" in saved or "lr" in saved:
        return {k: tuple(v) if k == "betas" else v for k, v in saved.items()}
    optim = config.get("optim", {})
    values = {"lr": optim.get("lr", 1e-3), "weight_decay": optim.get("weight_decay", 0.05)}
    if optim.get("name", "adamw") == "adamw":
        values |= {"betas": tuple(optim.get("betas", (0.9, 0.999))), "eps": optim.get("eps", 1e-8), **_GROUP}
    else:
        values |= {"momentum": optim.get("momentum", 0.9), "nesterov": True, "dampening": 0}
    return {**values, **saved}

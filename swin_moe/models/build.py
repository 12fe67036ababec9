"""Models by name: a family with the official constructor's defaults, or a file of configs/ with its own."""

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from swin_moe.config import Family, ModelConfig, MoEConfig
from swin_moe.config.checks import shown
from swin_moe.models.swin import SwinTransformer

# Defaults of the official SwinTransformer*.__init__ that differ from ours (microsoft/Swin-Transformer, models/*.py).
# eval_capacity_factor None: the official model evaluates with the capacity it trains with, ours by need.
_FAMILY_MOE = MoEConfig(balance_loss="gshard", eval_capacity_factor=None)

# Official constructor argument -> our field, where the names or the meaning differ.
_RENAMED: dict[str, tuple[str, Any]] = {
    "moe_blocks": ("blocks", None),
    "top_value": ("top_k", None),
    "cosine_router": ("router", {True: "cosine", False: "linear"}),
    "use_bpr": ("batch_prioritized", None),
    "is_gshard_loss": ("balance_loss", {True: "gshard", False: "load_importance"}),
    "cosine_router_dim": ("cosine_dim", None),
    "cosine_router_init_t": ("cosine_init_t", None),
    "moe_drop": ("dropout", None),
}
_FAMILIES: tuple[Family, ...] = get_args(Family)
_MODEL_FIELDS = frozenset(f.name for f in fields(ModelConfig)) - {"name", "moe"}
_MOE_FIELDS = frozenset(f.name for f in fields(MoEConfig))


def build_model(config: ModelConfig, *, recompute: str = "none") -> SwinTransformer:
    """Returns the network of a config, without meaningful weights: call init_weights(seed) or load some.

    Args:
        config: All sizes and numbers are global; nothing depends on the world size.
        recompute: "none", or "block": activations of every block are recomputed in backward.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"build_model takes a ModelConfig, got a {type(config).__name__}; create_model takes names")
    if recompute not in ("none", "block"):
        raise ValueError(f"build_model: recompute must be none or block, got {recompute!r}")
    return SwinTransformer(config, recompute=recompute)


def create_model(name: str | Path, **overrides: Any) -> SwinTransformer:
    """Returns an initialized model; on torch.device("meta") the weights stay empty.

    The capacity at evaluation is the training capacity (eval_capacity_factor=None), as in the official code, unless an
    override or the config file says otherwise; training configs default to capacity by need (0) instead.

    Args:
        name: A family (swin, swinv2, swin_mlp, swin_moe), which takes the official constructor's defaults, the path of
            a YAML file such as a run's config.yaml, or the name of a file in configs/ without .yaml.
        overrides: Official constructor arguments (img_size=256, moe_blocks=[...], top_value=2, ...), any field of
            ModelConfig or MoEConfig (num_experts is the global number; moe={...} gives several), and seed=0 for the
            initial weights.

    Raises:
        ValueError: Unknown name or override, or a value out of range.
    """
    seed = overrides.pop("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"create_model: seed must be a whole number, got {seed!r}")
    config, recompute = _named_config(name)
    config, recompute = _override(config, recompute, overrides)
    device = torch.get_default_device()
    # Built on meta first: torch's own initialization would cost time and draw from the global generator.
    with torch.device("meta"):
        model = build_model(config, recompute=recompute)
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights(seed)
    return model


def _named_config(name: str | Path) -> tuple[ModelConfig, str]:
    """Returns (model config, recompute) of a family or a config file."""
    if not isinstance(name, str | Path):
        raise ValueError(f"create_model: name must be a family, a file or the name of a config, got {name!r}")
    for family in _FAMILIES:
        if name == family:
            return ModelConfig(name=family, moe=_FAMILY_MOE), "none"
    from swin_moe.config.io import load_config  # only here: models do not depend on YAML

    config = load_config(name)
    moe = config.model.moe
    if moe.eval_capacity_factor == MoEConfig().eval_capacity_factor:
        moe = replace(moe, eval_capacity_factor=None)
    return replace(config.model, moe=moe), config.parallel.recompute


def _override(config: ModelConfig, recompute: str, overrides: dict[str, Any]) -> tuple[ModelConfig, str]:
    """Returns the config and recomputation with overrides applied."""
    from swin_moe.config.io import typed_tree  # only here: models do not depend on YAML

    model: dict[str, Any] = {}
    moe: dict[str, Any] = {}
    for key, value in overrides.items():
        if key == "moe":
            moe |= _moe_fields(value)
        elif key == "use_checkpoint":
            recompute = "block" if _flag(key, value) else "none"
        elif key in ("norm_layer", "fused_window_process"):
            _check_ignored(key, value)
        elif key in _RENAMED:
            field, values = _RENAMED[key]
            moe[field] = value if values is None else values[_flag(key, value)]
        elif key in _MODEL_FIELDS:
            model[key] = value
        elif key in _MOE_FIELDS:
            moe[key] = value
        else:
            raise ValueError(_unknown(key))
    model = typed_tree({"model": {**model, "moe": moe}}, source="create_model")["model"]
    moe = model.pop("moe")
    # At once: new depths are checked with the new blocks, never with the old ones.
    return replace(config, moe=replace(config.moe, **moe), **model), recompute


def _flag(key: str, value: Any) -> bool:
    """Returns an official argument that is true or false; raises ValueError for anything else."""
    if not isinstance(value, bool | int | np.bool_):
        raise ValueError(f"create_model: {key} must be true or false, got {shown(value)}")
    return bool(value)


def _moe_fields(value: Any) -> dict[str, Any]:
    """Returns the fields that moe=... sets, a MoEConfig or a dict of some of its fields."""
    if isinstance(value, MoEConfig):
        return {name: getattr(value, name) for name in _MOE_FIELDS}
    if not isinstance(value, Mapping):
        raise ValueError(f"create_model: moe must be a dict of MoEConfig's fields, or a MoEConfig, got {value!r}")
    unknown = next((key for key in value if key not in _MOE_FIELDS), None)
    if unknown is not None:
        close = difflib.get_close_matches(str(unknown), _MOE_FIELDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(_MOE_FIELDS))}"
        raise ValueError(f"create_model: moe has no field {unknown!r}; {hint}")
    return dict(value)


def _check_ignored(key: str, value: Any) -> None:
    """Accepts what changes no result; the kernels are chosen elsewhere."""
    if key == "norm_layer" and value not in (None, nn.LayerNorm):
        raise ValueError(f"norm_layer must be torch.nn.LayerNorm or None, got {value!r}")


def _unknown(key: str) -> str:
    """Returns the sentence about an override that does not exist."""
    if key == "num_local_experts":
        return "num_local_experts depends on the number of ranks; give num_experts, the global number of experts"
    known = [*_MODEL_FIELDS, *_MOE_FIELDS, *_RENAMED, "seed", "use_checkpoint", "norm_layer", "fused_window_process"]
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
    return f"create_model has no argument {key!r}{hint}"

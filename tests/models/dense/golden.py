"""How the reference outputs of dense tasks were made: weights and images as functions of names, errors against them."""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[2] / "golden" / "downstream"


def load(name: str) -> dict[str, Any]:
    """Returns the golden of a file name without its ending."""
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def _normal(shape: tuple[int, ...], tag: str) -> Tensor:
    state = np.random.RandomState(zlib.crc32(tag.encode()) & 0xFFFFFFFF)
    return torch.from_numpy(np.asarray(state.standard_normal(tuple(shape)))).float()


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns the value of a parameter or buffer, from its official name."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.long)
    z = _normal(shape, name)
    if name.endswith("running_var"):
        return 1 + 0.1 * z.abs()
    if name.endswith("logit_scale"):
        return math.log(10.0) + 0.1 * z
    if len(shape) == 1 and name.endswith(".weight"):
        return 1 + 0.1 * z
    return 0.05 * z


def image(shape: tuple[int, ...], tag: str) -> Tensor:
    """Returns standard normal pixels, from a tag."""
    return _normal(shape, tag)


def filled(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """Returns the official state dict without what is computed from sizes, and counts of batches nobody reads."""
    left_out = ("relative_position_index", "num_batches_tracked")
    return {name: fill(name, tuple(shape)) for name, shape in keys.items() if not name.endswith(left_out)}


def fill_network(network: nn.Module, golden: dict[str, Any]) -> None:
    """Loads the golden's weights by their official names; refuses a name or shape that is not there."""
    network.load_state_dict(filled(golden["keys"]), strict=True)


def error(reference: Tensor | dict[str, Any], got: Tensor) -> float:
    """Returns the relative L2 error against a stored tensor, whole or sampled."""
    got = got.detach().double()
    if isinstance(reference, Tensor):
        assert got.shape == reference.shape, (got.shape, reference.shape)
        return float((got - reference.double()).norm() / reference.double().norm().clamp(min=1e-12))
    assert list(got.shape) == list(reference["shape"]), (got.shape, reference["shape"])
    values = reference["values"].double()
    sampled = (got.flatten()[:: reference["step"]] - values).norm() / values.norm().clamp(min=1e-12)
    return max(float(sampled), abs(float(got.norm()) - reference["norm"]) / max(reference["norm"], 1e-12))

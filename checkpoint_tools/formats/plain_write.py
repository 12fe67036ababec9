"""Our parameters as a foreign state dict of whole tensors, or of some rows of each."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from checkpoint_tools.files.torch_writer import NewTensor
from checkpoint_tools.formats.geometry import check_geometry, check_parts
from checkpoint_tools.formats.infer import given_sizes, infer_model, merge_model
from checkpoint_tools.formats.rules import Rule, from_ours
from checkpoint_tools.sources.base import Options, Source, split_kind
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.layout import Chunk
from swin_moe.names.official import DENSE


def plain_tensors(
    source: Source,
    options: Options,
    rules: Callable[[str], Iterable[Rule]],
    *,
    families: tuple[str, ...],
    name: str,
    without: tuple[str, ...] = (),
) -> tuple[dict[str, NewTensor], dict[str, Any]]:
    """Returns (foreign name -> tensor, the network's options); what the format cannot hold is reported.

    Args:
        rules: Gives the rules for model.name.
        families: What model.name may be. name: Of the format, for errors.
        without: Kinds of tensors that the caller writes itself.

    Raises:
        CheckpointError: The network has experts, is of another family, or one that the format's program computes
            otherwise.
    """
    names = [tensor for tensor in source.tensors if split_kind(tensor)[0] == "weight"]
    shapes = {tensor: source.tensors[tensor].shape for tensor in names}
    if any(tensor.startswith(DENSE) for tensor in names):
        raise CheckpointError(
            f"{source.path}: is of a detector or segmentor, {name} has no such; write it with --to dense"
        )
    network = merge_model(source.config, infer_model(source.path, shapes)).get("model", {}) | given_sizes(options.extra)
    family = network.get("name")
    experts = next((tensor for tensor in names if is_expert_tensor(tensor)), None)
    if experts is not None:
        raise CheckpointError(f"{source.path}: tensor {experts}: {name} has no networks with experts")
    if family not in families or network.get("extra_norm_every"):
        raise CheckpointError(
            f"{source.path}: model.name={family} with model.extra_norm_every={network.get('extra_norm_every', 0)} is "
            f"no network of {name}; it has {' and '.join(families)} without extra norms"
        )
    check_parts(source.path, network, names, name)
    check_geometry(source.path, network, name)
    left = sorted({split_kind(tensor)[0] for tensor in source.tensors} - {"weight", *without})
    if left:
        options.report(f"{source.path}: {name} files hold parameters only; left out: {', '.join(left)}")
    return renamed(source, {tensor: tensor for tensor in names}, rules(family)), network


def averages_of(source: Source) -> dict[str, str]:
    """Returns each parameter of a source and the tensor that holds its average, itself where it has none."""
    names = [tensor for tensor in source.tensors if split_kind(tensor)[0] == "weight"]
    return {name: f"ema/{name}" if f"ema/{name}" in source.tensors else name for name in names}


def renamed(source: Source, stored: Mapping[str, str], rules: Iterable[Rule]) -> dict[str, NewTensor]:
    """Returns foreign name -> tensor; `stored` has the tensor of the source that is written for each parameter."""
    tensors: dict[str, NewTensor] = {}
    chosen = tuple(rules)
    for name, tensor in stored.items():
        foreign = from_ours(name, chosen)
        for part, target in enumerate(foreign):
            tensors[target] = rows(source, tensor, part, len(foreign))
    return tensors


def rows(source: Source, name: str, part: int, parts: int) -> NewTensor:
    """Returns part `part` of `parts` equal ones along dim 0 of a tensor."""
    shape, dtype = source.tensors[name]
    if parts == 1:
        return NewTensor(shape, dtype, lambda box, out: source.read(name, box, out))
    if shape[0] % parts:
        raise CheckpointError(f"{source.path}: tensor {name}: {shape[0]} rows cannot be split in {parts}")
    count = shape[0] // parts

    def fill(box: Chunk, destination: np.ndarray) -> None:
        source.read(name, Chunk((box.offset[0] + part * count, *box.offset[1:]), box.size), destination)

    return NewTensor((count, *shape[1:]), dtype, fill)

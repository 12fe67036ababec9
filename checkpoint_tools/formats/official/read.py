"""Official files as a source: of one process, or of the ranks that each hold their own experts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.files.record_file import RecordFile, TensorRecord
from checkpoint_tools.formats.infer import given_sizes, infer_model, known_step, merge_model
from checkpoint_tools.formats.official.expert_files import Layer, expert_parts, layer_sizes
from checkpoint_tools.formats.official.layout import is_buffer
from checkpoint_tools.formats.official.state import Moments, native_config, read_moments, training_state
from checkpoint_tools.formats.plain_read import sizes_of
from checkpoint_tools.formats.rules import FROM_OFFICIAL, Rule, check_ours, to_ours
from checkpoint_tools.formats.state_dict import find_weights
from checkpoint_tools.sources.assembled import AssembledSource, Leaf, Part, Place, join_parts
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.pieces import is_expert_tensor
from swin_moe.names.state_dict import Weights

Model = dict[str, TensorRecord]
Rules = tuple[Rule, ...]


def assemble(
    form: str,
    path: Path,
    ranks: list[RecordFile],
    shared: RecordFile | None,
    options: Options,
    *,
    rules: Rules = FROM_OFFICIAL,
    optimizer: bool = True,
) -> AssembledSource:
    """Returns the source that the files of all ranks make, with what only `shared` holds.

    Args:
        optimizer: Whether its state is read; only of files with the official key "model".

    Raises:
        CheckpointError: A tensor is missing on some rank, has another shape than its layout says, or experts are lost.
    """
    found = [find_weights(file.content, file.path) for file in ranks]
    models = [weights.records for weights in found]
    optimizer = optimizer and _has_official_order(path, ranks[0], found[0], options)
    shared_weights = find_weights(shared.content, shared.path) if shared is not None else Weights({})
    rest = shared_weights.records
    leaves = _gather(ranks, models, shared, rest, rules)
    shapes = {name: found[0].record.shape for name, found in leaves.items() if not is_expert_tensor(name)}
    layers = _layers(path, leaves, shapes, len(ranks))
    parts = _parts(path, leaves, layers)
    sizes = {name.removeprefix("encoder."): shape for name, shape in sizes_of(parts).items()}
    inferred = infer_model(path, sizes, _buffers(models[0] | rest))
    moments = _read_moments(path, ranks, models, options) if optimizer else []
    if moments:
        states = [
            {f"optim.{kind}/{name}": r for kind, named in found.tensors.items() for name, r in named.items()}
            for found in moments
        ]
        parts |= _parts(path, _gather(ranks, states, None, {}, rules), layers)
    averages = [_averages(weights) for weights in found]
    parts |= _parts(path, _gather(ranks, averages, shared, _averages(shared_weights), rules), layers)
    newest = max(moments, key=lambda found: found.step or 0, default=None)
    step, unknown = known_step(path, newest.step if newest else 0, options)
    if newest:
        newest = newest._replace(step=step)
    first = ranks[0]
    content = first.content if isinstance(first.content, dict) else {}
    config = native_config(content, inferred, first.path, options, world=len(ranks))
    config = merge_model(config, {}, given_sizes(options.extra)) if inferred else config
    source = AssembledSource(
        form,
        path,
        parts,
        options,
        step=step,
        state=training_state(content, newest, config, first.path),
        config=config,
        provenance={"source": {"format": form, "files": len(ranks) + (shared is not None)}},
    )
    source.step_unknown = unknown
    source.tables = {n: Leaf(first, r) for n, r in models[0].items() if n.endswith("relative_coords_table")}
    return source


def _averages(weights: Weights[TensorRecord]) -> Model:
    return {f"ema/{name}": record for name, record in weights.averaged.items()}


def _has_official_order(path: Path, file: RecordFile, weights: Weights, options: Options) -> bool:
    """Returns whether the optimizer of a file, if any, numbers parameters as the official loop; reports it if not."""
    if not isinstance(file.content, dict) or "optimizer" not in file.content or weights.wrapper in ("", "model"):
        return True
    options.report(f"{path}: its optimizer is not in the official order of parameters and is left out")
    return False


def _layers(
    path: Path, leaves: Mapping[str, list[Leaf]], shapes: Mapping[str, tuple[int, ...]], world: int
) -> dict[str, Layer]:
    """Returns the sizes of each MoE layer by its prefix."""
    dense = next((shapes[name] for name in sorted(shapes) if name.endswith(".mlp.fc1.weight")), None)
    ending = ".experts.fc1_weight"
    found = {name.removesuffix(ending): of[0].record.shape for name, of in leaves.items() if name.endswith(ending)}
    return {prefix: layer_sizes(path, prefix, shapes, local, world, dense=dense) for prefix, local in found.items()}


def _read_moments(path: Path, ranks: list[RecordFile], models: list[Model], options: Options) -> list[Moments]:
    """Returns each rank's optimizer state; [] where there is none.

    Raises:
        CheckpointError: Only some ranks have one.
    """
    found = [
        read_moments(file.content, file, {name: record.shape for name, record in model.items()})
        for file, model in zip(ranks, models)
    ]
    moments = [one for one in found if one is not None]
    if moments and len(moments) < len(ranks):
        raise CheckpointError(f"{path}: some rank files hold an optimizer and some do not")
    steps = sorted({one.step for one in moments if one.step is not None})
    if len(steps) > 1:
        options.report(f"{path}: the ranks did {steps} optimizer steps; the largest is kept")
    return moments


def _gather(
    ranks: list[RecordFile], models: list[Model], shared: RecordFile | None, rest: Model, rules: Rules
) -> dict[str, list[Leaf]]:
    """Returns our name -> one leaf per rank, or a single one for what only the shared file holds.

    An expert tensor that only the shared file holds is the frozen second bias of rank 0: official ranks load it as
    their own, so it stands for every rank.
    """
    leaves: dict[str, list[Leaf]] = {}
    for file, model in zip(ranks, models):
        for name, record in _renamed(file, model, rules).items():
            leaves.setdefault(name, []).append(Leaf(file, record))
    if shared is not None:
        for name, record in _renamed(shared, rest, rules).items():
            if name in leaves:
                raise CheckpointError(f"{shared.path}: tensor {name} is in {leaves[name][0].file.path.name} too")
            leaves[name] = [Leaf(shared, record)] * (len(ranks) if is_expert_tensor(name) else 1)
    for name, found in leaves.items():
        if len(found) != len(ranks) and found[0].file is not shared:
            holders = {leaf.file.path for leaf in found}
            other = next(file.path for file in ranks if file.path not in holders)
            raise CheckpointError(f"{other}: holds no tensor {name}, which {found[0].file.path.name} holds")
    return leaves


def _renamed(file: RecordFile, model: Model, rules: Rules) -> Model:
    """Returns tensors, `optim.<kind>/<name>` or `ema/<name>` under our names, without what a rule drops.

    Raises:
        CheckpointError: Two tensors of the file stand for one of ours.
    """
    result: Model = {}
    for official, record in model.items():
        kind, slash, foreign = official.rpartition("/")
        place = to_ours(foreign, rules)
        if place is None:
            continue
        name = f"{kind}{slash}{check_ours(place.name, foreign, file.path)}"
        if name in result:
            raise CheckpointError(f"{file.path}: two tensors stand for {name}, one of them {foreign}")
        result[name] = record
    return result


def _parts(path: Path, leaves: Mapping[str, list[Leaf]], layers: Mapping[str, Layer]) -> dict[str, list[Part]]:
    experts = {name: found for name, found in leaves.items() if is_expert_tensor(name)}
    dense = ((Place(name), tuple(found)) for name, found in leaves.items() if name not in experts)
    parts = join_parts(path, dense)
    for name, found in experts.items():
        layer = layers.get(name.rpartition("/")[2].partition(".experts.")[0])
        if layer is None:
            raise CheckpointError(f"{path}: tensor {name} belongs to experts without fc1_weight")
        parts[name] = expert_parts(name, found, layer)
    return parts


def _buffers(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("encoder."): record.shape for name, record in model.items() if is_buffer(name)}

"""Foreign state dicts whose every tensor is one of ours, or some rows of one: what timm and transformers write."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from checkpoint_tools.files.record_file import RecordFile, TensorRecord
from checkpoint_tools.formats.rules import Rule, check_ours, to_ours
from checkpoint_tools.sources.assembled import Leaf, Part, Place, join_parts
from checkpoint_tools.sources.base import split_kind


def place_records(
    path: Path, records: Mapping[str, tuple[RecordFile, TensorRecord]], rules: Iterable[Rule]
) -> dict[str, list[Part]]:
    """Returns the parts of our tensors; averages, `ema/<foreign name>`, become `ema/<our name>`.

    Raises:
        CheckpointError: A tensor has no place in our networks, stands twice, or lacks a part; names it.
    """
    rules = tuple(rules)
    placed: list[tuple[Place, tuple[Leaf, ...]]] = []
    for name, (file, record) in records.items():
        kind, slash, foreign = name.rpartition("/")
        place = to_ours(foreign, rules)
        if place is not None:
            ours = check_ours(place.name, foreign, path)
            placed.append((place._replace(name=f"{kind}{slash}{ours}"), (Leaf(file, record),)))
    return join_parts(path, placed)


def parameter_sizes(parts: Mapping[str, list[Part]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of those of our tensors that are parameters."""
    return sizes_of({name: found for name, found in parts.items() if split_kind(name)[0] == "weight"})


def sizes_of(parts: Mapping[str, list[Part]]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of our tensors: where its parts end."""
    return {
        name: tuple(
            max(o + n for o, n in zip(offsets, sizes))
            for offsets, sizes in zip(
                zip(*(part.box.offset for part in found)), zip(*(part.box.size for part in found))
            )
        )
        for name, found in parts.items()
    }

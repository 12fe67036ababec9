"""Foreign state dicts whose every tensor is one of ours, or some rows of one: what timm and transformers write."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from checkpoint_tools.files.record_file import RecordFile, TensorRecord
from checkpoint_tools.formats.rules import Rule, check_ours, to_ours
from checkpoint_tools.sources.assembled import Leaf, Part, Place, join_parts


def place_records(
    path: Path, records: Mapping[str, tuple[RecordFile, TensorRecord]], rules: Iterable[Rule]
) -> dict[str, list[Part]]:
    """Returns the parts of our tensors.

    Raises:
        CheckpointError: A tensor has no place in our networks, stands twice, or lacks a part; names it.
    """
    rules = tuple(rules)
    placed: list[tuple[Place, tuple[Leaf, ...]]] = []
    for name, (file, record) in records.items():
        place = to_ours(name, rules)
        if place is not None:
            check_ours(place.name, name, path)
            placed.append((place, (Leaf(file, record),)))
    return join_parts(path, placed)


def sizes_of(parts: Mapping[str, list[Part]]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of our tensors: where its parts end."""
    return {
        name: tuple(max(o + n for o, n in zip(offsets, sizes)) for offsets, sizes in zip(
            zip(*(part.box.offset for part in found)), zip(*(part.box.size for part in found))
        ))
        for name, found in parts.items()
    }  # fmt: skip

"""Which options belong to the state of a run, and so to the identity of its checkpoints: those without NOT_STATE."""

from dataclasses import fields, is_dataclass
from typing import Any

from swin_moe.config.checks import field_types
from swin_moe.config.schema import Config


def canonical_config(config: dict[str, Any], section: type = Config) -> dict[str, Any]:
    """Returns a config's tree without what may differ between layouts and hosts for the same state.

    Keys that the schema does not know stay.

    Args:
        section: The dataclass that the tree is of.
    """
    dropped = {f.name for f in fields(section) if not f.metadata.get("state", True)}
    kinds = field_types(section)
    result = {}
    for key, value in config.items():
        if key not in dropped:
            inside = isinstance(value, dict) and is_dataclass(kinds.get(key))
            result[key] = canonical_config(value, kinds[key]) if inside else value
    return result

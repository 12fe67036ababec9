"""What became of every tensor of a load."""

from dataclasses import dataclass, field

Named = list[tuple[str, str]]  # (parameter name, reason)


@dataclass
class LoadReport:
    """What became of every tensor; `print` shows a line per reason.

    Attributes:
        loaded: Parameters copied as they are.
        interpolated: Parameters copied in another shape, and by which rule.
        dropped: Tensors of the file without a place in the model.
        reinitialized: Parameters the file did not fill.
        notes: Advice in whole sentences.
    """

    loaded: list[str] = field(default_factory=list)
    interpolated: Named = field(default_factory=list)
    dropped: Named = field(default_factory=list)
    reinitialized: Named = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Returns the report as text, a line per reason."""
        lines = [f"loaded {len(self.loaded)} tensors"]
        for title in ("interpolated", "dropped", "reinitialized"):
            reasons: dict[str, list[str]] = {}
            for name, reason in getattr(self, title):
                reasons.setdefault(reason, []).append(name)
            lines += [f"{title} {_some(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _some(names: list[str]) -> str:
    """Returns a count and the first name or two."""
    return f"{len(names)} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"

"""`swin-moe show CONFIG`: every option as a run would have it, and which file, word or default that came from."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from swin_moe.config.arguments import command_parser, print_answer
from swin_moe.config.io import config_folder, load_with_origins

DEFAULT = "default"
_EXAMPLES = """examples:
  what a run of this config would do
    swin-moe show swin_tiny_patch4_window7_224
  only what differs from the defaults
    swin-moe show swin_tiny_patch4_window7_224 --changed
  the optimizer, with an option of one's own
    swin-moe show digits_swin_moe optim.lr=1e-3 --section optim"""


def run(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    sys.exit(main(argv))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence about what is wrong."""
    return print_answer(lambda: _answer(_parse(argv)))


def resolved(config: str, overrides: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted key, value, where it came from) of every option; raises ValueError as load_config."""
    built, origins = load_with_origins(config, overrides)
    for key, value in _leaves(built):
        yield key, value, origins.get(key, DEFAULT)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("show", __doc__.partition(": ")[2], _EXAMPLES)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a YAML file or the name of one in configs/")
    add("overrides", nargs="*", metavar="key=value", help="any option of the config")
    add("--changed", action="store_true", help="leave out what has its default")
    add("--section", default="", metavar="KEY", help="only what is below a key: optim, model.moe")
    add("--json", action="store_true", help="{key: {value, from}}")
    return parser.parse_intermixed_args(argv)


def _answer(options: argparse.Namespace) -> str:
    rows = list(resolved(options.config, options.overrides))
    below = options.section.rstrip(".")
    if below and not any(_is_below(key, below) for key, _, _ in rows):
        sections = ", ".join(dict.fromkeys(key.partition(".")[0] for key, _, _ in rows))
        raise ValueError(f"--section: there is no option below {below!r}; sections: {sections}")
    rows = [row for row in rows if _is_below(row[0], below) and not (options.changed and row[2] == DEFAULT)]
    if options.json:
        return json.dumps({key: {"value": value, "from": origin} for key, value, origin in rows}, indent=1)
    return "\n".join(_lines(rows))


def _is_below(key: str, below: str) -> bool:
    return not below or key == below or key.startswith(f"{below}.")


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _lines(rows: list[tuple[str, Any, str]]) -> Iterator[str]:
    """Yields YAML that load_config reads back, with the origins as comments."""
    open_sections: list[str] = []
    texts = []
    for key, value, origin in rows:
        *sections, name = key.split(".")
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        texts += [(f"{'  ' * depth}{sections[depth]}:", "") for depth in range(shared, len(sections))]
        open_sections = sections
        texts.append((f"{'  ' * len(sections)}{name}: {_written(value)}", _short(origin)))
    width = min(64, max((len(text) for text, origin in texts if origin), default=0))
    for text, origin in texts:
        yield f"{text:<{width}}  # {origin}" if origin else text


def _written(value: Any) -> str:
    """Returns a value as YAML on one line."""
    plain = json.loads(json.dumps(value))  # tuples as lists
    text = yaml.safe_dump(plain, default_flow_style=True, width=1 << 20)
    return text.removesuffix("...\n").strip()


def _short(origin: str) -> str:
    """Returns the path of a shipped config as it is called there."""
    path, folder = Path(os.path.normpath(origin)), config_folder()
    return str(path.relative_to(folder)) if path.is_absolute() and path.is_relative_to(folder) else origin

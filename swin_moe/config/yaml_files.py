"""YAML as configs are written in it, and what is no such file in one sentence."""

import contextlib
import re
from pathlib import Path
from typing import ClassVar

import yaml

from swin_moe.config.checks import shown
from swin_moe.config.mistaken import belongs


class ConfigLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-4` is a number and `off` a word, not as in YAML 1.1; a key that stands twice fails."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}  # type: ignore[misc]  # PyYAML's stubs: of an instance

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Returns the mapping; raises yaml.YAMLError for a key that stands twice, where PyYAML keeps the last."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Returns the number; raises yaml.YAMLError for a word that was called one, or endless digits."""
        try:
            return int(self.construct_scalar(node))
        except ValueError:
            raise yaml.constructor.ConstructorError(
                None, None, f"no whole number: {shown(node.value)}", node.start_mark
            ) from None

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Returns the number; raises yaml.YAMLError for a word that was called one."""
        try:
            return super().construct_yaml_float(node)
        except ValueError:
            raise yaml.constructor.ConstructorError(
                None, None, f"no number: {shown(node.value)}", node.start_mark
            ) from None

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        """Returns the value; raises yaml.YAMLError for a word that was called one."""
        word = self.construct_scalar(node).lower()
        if word not in self.bool_values:
            raise yaml.constructor.ConstructorError(
                None, None, f"neither true nor false: {shown(node.value)}", node.start_mark
            )
        return self.bool_values[word]


for _name in ("int", "float", "bool"):
    ConfigLoader.add_constructor(f"tag:yaml.org,2002:{_name}", getattr(ConfigLoader, f"construct_yaml_{_name}"))
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*)?\.?[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+\.(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    ConfigLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


_MOST = 1 << 20  # characters of a config; a device may have no end


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole, or leaves what was there; a device or pipe (/dev/null) is written to, not replaced.

    Raises:
        OSError: It cannot be written; names `path`.
    """
    special = path.exists() and not path.is_file()
    draft = path if special else path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        if not special:
            draft.replace(path)
    except OSError as error:
        if not special:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_yaml(path: Path) -> dict:
    """Returns the sections of a file, {} for an empty one.

    Raises:
        ValueError: It is no YAML file, or holds something else than sections.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST)
        if len(text) == _MOST:
            raise ValueError(f"{path} is no config: it holds {_MOST} characters or more")
        tree = yaml.load(text, ConfigLoader)
    except UnicodeDecodeError:
        if clause := belongs(path):
            raise ValueError(f"{path} is no config and no run{clause}") from None
        raise ValueError(
            f"{path} is not a YAML file but a binary one; a config or a run comes first, then images, and weights as "
            f"checkpoint.load={path}"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ValueError(f"{path} is not a config: its lists are nested too deeply") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections such as 'model:', got {type(tree).__name__}")
    return tree

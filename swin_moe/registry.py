"""Tables of lazily imported backends: a name in a config stands for "module:attribute", or is one itself."""

import importlib
import importlib.metadata
import re
from typing import Any

_SHOWN = 120  # characters of a name that is refused


def lookup(table: dict[str, str], name: str, *, key: str) -> Any:
    """Returns the object that `name` stands for, importing its module only now.

    A name of the form "package.module:Name" stands for itself, so that a variant may live outside this repository.

    Args:
        table: Choices, name -> "module:attribute".
        name: What the config says.
        key: Config key the name came from, for the error.

    Raises:
        ValueError: `name` is not in the table, or an optional package it needs is not installed.
    """
    if name not in table and not is_outside(name):
        shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]} ...")
        raise ValueError(f"{key}: unknown choice {shown}; allowed: {', '.join(sorted(table))}, or package.module:Name")
    module, _, attribute = table.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise ValueError(f"{key}={name}: the module {module} has no {attribute}") from None
    except ModuleNotFoundError as error:
        if name not in table and module.startswith(str(error.name)):
            raise ValueError(f"{key}={name}: there is no module {error.name} (is it on PYTHONPATH?)") from None
        package = (error.name or "").partition(".")[0]
        if package in ("", "swin_moe"):
            raise
        raise ValueError(
            f"{key}={name} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'swin-moe[{name}]'"
        ) from error


def is_outside(name: object) -> bool:
    """Returns whether a name has the form "package.module:Name"."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name) is not None


def check_members(value: object, protocol: type, *, chosen: str, where: str) -> None:
    """Raises ValueError, naming them, where what a row of a table gave lacks members of its protocol: found at start,
    not when the first of them is needed.

    Args:
        chosen: The option and its value. where: The protocol, as "file: name".
    """
    kinds = vars(protocol).items()
    wanted = [*protocol.__annotations__, *(key for key, kind in kinds if callable(kind) or isinstance(kind, property))]
    lacks = [member for member in wanted if not member.startswith("_") and not hasattr(value, member)]
    if lacks:
        raise ValueError(f"{chosen}: {type(value).__name__} lacks {', '.join(lacks)} ({where})")


def require(package: str, version: str) -> None:
    """Raises at import of a backend whose package is imported only later; `lookup` turns a missing one into a sentence.

    Args:
        version: The only one the backend was checked with: it relies on what other versions may change silently.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: It is another version.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"no package {package}", name=package) from error
    if found != version:
        raise ValueError(
            f"{package} {found} is installed, but only {version} was checked; pip install {package}=={version}"
        )

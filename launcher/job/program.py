"""Whether a program can be started at all, found out without running any of it."""

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_DATA = (".yaml", ".yml", ".json", ".toml")  # what is meant as the program's argument


def check_program(program: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises ValueError, one sentence, where every rank would fail to find or read the program.

    Args:
        program: "-m module ARGS" or "script.py ARGS"; the script is a file (command.Job.check).
        environment: What ranks get on top of this process's environment; PYTHONPATH counts.
    """
    if program[0] == "-m":
        _check_module(program[1], [os.getcwd(), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))])
    else:
        _check_script(Path(program[0]))


def _check_script(path: Path) -> None:
    if path.suffix.lower() in _DATA:
        raise ValueError(
            f"{str(path)!r} is no program but a {path.suffix[1:].upper()} file; name the program before it, as in: "
            f"-- -m swin_moe.train {path}"
        )
    if path.suffix == ".pyc" or path.suffix != ".py" and _is_zip(path):
        return
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"program {str(path)!r} is not Python{where}: {what}") from None


def _is_zip(path: Path) -> bool:
    import zipfile

    return zipfile.is_zipfile(path)


def _check_module(name: str, folders: list[str]) -> None:
    """Raises ValueError for a module that does not exist, with near names, or a package that is no program."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"-m takes the name of a module, such as swin_moe.train, got {name!r}")
    spec, places = None, None
    for number, part in enumerate(parts):
        spec = _find(part, places, folders)
        if spec is None:
            if _exists(name):
                return
            import difflib  # costs every start of the launcher 5 ms, and only a wrong name needs it

            near = difflib.get_close_matches(part, sorted(_names(places, folders)), n=1)
            meant = f"; did you mean {'.'.join([*parts[:number], *near, *parts[number + 1 :]])}?" if near else ""
            inside = f" in {'.'.join(parts[:number])}" if number else ""
            raise ValueError(f"-m {name}: there is no module {part!r}{inside}{meant}")
        places = list(spec.submodule_search_locations or [])
    if spec is not None and spec.submodule_search_locations is not None:
        if _find("__main__", places, folders) is None:
            raise ValueError(f"-m {name}: this package is no program, it has no __main__; name one of its modules")


def _find(name: str, places: list[str] | None, folders: list[str]) -> ModuleSpec | None:
    """Returns where a module is, importing nothing.

    Args:
        name: Without its package's.
        places: Its package's folders; None for a top-level module.
        folders: Where top-level ones may be besides where this process finds them.
    """
    if places is not None:
        return PathFinder.find_spec(name, places)
    finders = (finder.find_spec(name, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return PathFinder.find_spec(name, folders) or next(filter(None, finders), None)


def _exists(name: str) -> bool:
    """Returns whether a module is there once its packages are imported, which may add folders to themselves."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
    except Exception:  # a package of the user's that fails: its own words say more, on the ranks
        return True


def _names(places: list[str] | None, folders: list[str]) -> Iterator[str]:
    """Yields the modules that could have been meant."""
    import pkgutil

    for module in pkgutil.iter_modules(places if places is not None else [*folders, *sys.path]):
        yield module.name

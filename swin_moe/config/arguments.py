"""The argument parser of our commands: a wrong word is one sentence, as everywhere, not a page about usage."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from swin_moe.config import synonyms
from swin_moe.names.files import RUN_CONFIG

_SHOWN = 300  # characters of what argparse says, which repeats what was typed
_LOOKED_AT = 4096  # entries of a folder, whose names are compared with a word
_ALIKE = 0.7  # of two names, as difflib counts it
_RUNS = Path("output")  # where run.output has them
_MOST = (1 << 63) - 1  # of a whole number, as everywhere outside of Python


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ValueErrors that name the option."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, _whole_number)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Writes all of it: argparse's own drops the error of a pipe that nobody reads, as if all had been read."""
        (file or sys.stderr).write(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns what argparse's does. Raises ValueError for an empty word."""
        if empty := empty_word(sys.argv[1:] if args is None else args):
            self.error(empty)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's words and where to read more."""
        words = shortened(message)
        if unknown := re.match(r"unrecognized arguments: (-[^\s=]+)", words):
            near = nearest(unknown[1], self._option_string_actions)
            words += f"; did you mean {near}?" if near else ""
        raise ValueError(f"{self.prog}: {words}; {self.prog} --help says more")


def shortened(message: str) -> str:
    """Returns what argparse says in one line, which repeats what was typed, however long that was."""
    words = " ".join(message.split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."


def command_parser(command: str, description: str, examples: str) -> Parser:
    """Returns the parser of `swin-moe COMMAND`; the lines of both texts stay as they are."""
    return Parser(
        prog=f"swin-moe {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def print_answer(answer: Callable[[], str], describe: Callable[[BaseException], str] = str) -> int:
    """Prints what a command answers; returns its exit code, see exit_code. What is wrong with the output is not the
    command's to say."""
    text: list[str] = []
    code = exit_code(lambda: text.append(answer()), describe)
    if code == 0:
        print(*text)
    return code


def exit_code(work: Callable[[], object], describe: Callable[[BaseException], str] = str) -> int:
    """Does a command's work; returns its exit code: 0, or 2 after one sentence about what is wrong.

    Args:
        describe: How an error is said.
    """
    try:
        work()
    except BrokenPipeError:  # the command line ends in silence
        raise
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    return 0


def empty_word(words: Sequence[str]) -> str:
    """Returns what is wrong with words of which one is empty, "" = none is.

    It is an unset variable of a shell script, and would mean the folder we are in, or that the option was not given.
    """
    for number, word in enumerate(words):
        if re.fullmatch("--[^=]+=", word):
            return f"{word} has no value; give one, or leave it out"
        if not word:
            before = words[number - 1] if number else "the command"
            return f"{before} is followed by an empty word; give a value, or leave it out"
    return ""


def _whole_number(text: str) -> int:
    """Returns an option's number; raises ValueError, as int does, for one that no tensor or file could hold."""
    number = int(text)
    if abs(number) > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}, got {text}")
    return number


_whole_number.__name__ = "int"  # argparse says "invalid int value"


def nearest(word: str, options: Iterable[str]) -> str:
    """Returns the option that a word is near to, or ""."""
    return next(iter(difflib.get_close_matches(word, list(options), n=1)), "")


def near_path(path: str | Path) -> str:
    """Returns "; did you mean PATH?" of a path that is not there: the run of that name, or what lies beside it and is
    called nearly so; else ""."""
    path = Path(path)
    try:
        if path.exists():
            return ""
        if (_RUNS / path / RUN_CONFIG).is_file():
            return f"; did you mean {_RUNS / path}?"
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _LOOKED_AT)]
    except (OSError, ValueError):  # no such folder; a NUL in it
        return ""
    stems = [Path(name).stem for name in names]  # not by an ending that all may have
    near = next(iter(difflib.get_close_matches(path.stem, stems, n=1, cutoff=_ALIKE)), "")
    alike = [name for name in names if near and Path(name).stem == near]
    if not alike:
        return ""
    return f"; did you mean {path.parent / difflib.get_close_matches(path.name, alike, n=1, cutoff=0)[0]}?"


def refuse_options(command: str, words: Iterable[str], options: Iterable[str] = ()) -> None:
    """Raises ValueError for an option that a command does not have, or that has an empty value.

    A file of an option's name is none, and neither is a number.
    """
    known, words = list(options), list(words)
    for number, word in enumerate(words):
        name = word.partition("=")[0]
        if name in known and (empty := empty_word(words[number : number + 2])):
            raise ValueError(f"{command}: {empty}")
        if not re.match(r"-+[^\W\d]", word) or name in known or os.path.exists(word):
            continue
        near = nearest(name, known)
        meant = f"did you mean {near}? " if near else ""
        other = synonyms.meant(name, given="=...")
        has = f"{meant}it has {', '.join(known)}" if known else "options are given as section.key=value"
        if other and not near:
            has = f"{other} Options are given as section.key=value" if other.endswith("?") else other
        raise ValueError(f"{command} has no option {name[:_SHOWN]}; {has}")

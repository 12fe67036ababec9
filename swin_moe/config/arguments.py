"""The argument parser of our commands: a wrong word is one sentence, as everywhere, not a page about usage."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from swin_moe.config import synonyms

_SHOWN = 300  # characters of what argparse says, which repeats what was typed


_MOST = (1 << 63) - 1  # of a whole number, as everywhere outside of Python


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ValueErrors that name the option."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, _whole_number)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's words and where to read more."""
        words = " ".join(message.split())
        words = words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."
        if unknown := re.match(r"unrecognized arguments: (-[^\s=]+)", words):
            near = nearest(unknown[1], self._option_string_actions)
            words += f"; did you mean {near}?" if near else ""
        raise ValueError(f"{self.prog}: {words}; {self.prog} --help says more")


def command_parser(command: str, description: str, examples: str) -> Parser:
    """Returns the parser of `swin-moe COMMAND`; the lines of both texts stay as they are."""
    return Parser(
        prog=f"swin-moe {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def print_answer(answer: Callable[[], str], describe: Callable[[BaseException], str] = str) -> int:
    """Prints what a command answers; returns its exit code, see exit_code."""
    return exit_code(lambda: print(answer()), describe)


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


def refuse_options(command: str, words: Iterable[str], options: Iterable[str] = ()) -> None:
    """Raises ValueError for an option that a command does not have; a file of such a name and a number are none."""
    known = list(options)
    for word in words:
        name = word.partition("=")[0]
        if not re.match(r"-+[^\W\d]", word) or name in known or os.path.exists(word):
            continue
        near = nearest(name, known)
        meant = f"did you mean {near}? " if near else ""
        other = synonyms.meant(name, given="=...")
        has = f"{meant}it has {', '.join(known)}" if known else "options are given as section.key=value"
        if other and not near:
            has = f"{other} Options are given as section.key=value"
        raise ValueError(f"{command} has no option {name[:_SHOWN]}; {has}")

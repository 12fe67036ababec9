"""The argument parser of our commands: a wrong word is one sentence, as everywhere, not a page about usage."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable
from typing import NoReturn

_SHOWN = 300  # characters of what argparse says, which repeats what was typed


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ValueErrors that name the option."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's words and where to read more."""
        words = " ".join(message.split())
        words = words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."
        if unknown := re.match(r"unrecognized arguments: (-[^\s=]+)", words):
            near = nearest(unknown[1], self._option_string_actions)
            words += f"; did you mean {near}?" if near else ""
        raise ValueError(f"{self.prog}: {words}; {self.prog} --help says more")


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
        has = f"{meant}it has {', '.join(known)}" if known else "options are given as section.key=value"
        raise ValueError(f"{command} has no option {name[:_SHOWN]}; {has}")

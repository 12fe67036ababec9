"""The argument parser of our commands: a wrong word is one sentence, as everywhere, not a page about usage."""

import argparse
from typing import NoReturn

_SHOWN = 300  # characters of what argparse says, which repeats what was typed


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ValueErrors that name the option."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's words and where to read more."""
        words = " ".join(message.split())
        words = words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."
        raise ValueError(f"{self.prog}: {words}; {self.prog} --help says more")

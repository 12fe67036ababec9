"""Arguments that several verbs share, and the options they mean."""

import argparse
from typing import Any

from checkpoint_tools.formats import FORMATS
from checkpoint_tools.formats.settings import SETTINGS
from checkpoint_tools.sources.base import MAX_MEMORY, Options
from checkpoint_tools.verbs.text import parse_bytes
from swin_moe.checkpoint.communicator import Communicator
from swin_moe.checkpoint.content import FILE_SIZE
from swin_moe.checkpoint.digest import ALGORITHMS, DEFAULT
from swin_moe.registry import is_outside


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every verb."""
    add = parser.add_argument
    memory = "resident bytes per process beyond the interpreter and its modules (default 512M)"
    add("--max-memory", type=parse_bytes, default=MAX_MEMORY, metavar="SIZE", help=memory)
    add("--no-verify", action="store_true", help="do not compare what is read with its digests")


def add_format_argument(parser: argparse.ArgumentParser, option: str = "--from", *, of: str = "") -> None:
    """Adds the option that names the format of what is read, "" = guessed; `--from` is stored as `format`.

    of: Whose format, for its help.
    """
    name = "format" if option == "--from" else None
    help_text = f"{of}, default: guessed" if of else "default: guessed"
    shown = f"{{{','.join(sorted(FORMATS))}}}"
    parser.add_argument(option, dest=name, default="", action=_FormatAction, metavar=shown, help=help_text)


class _FormatAction(argparse.Action):
    """Takes a row of FORMATS or a package.module:Name; argparse's `choices` would refuse the latter."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        if value not in FORMATS and not is_outside(value):
            allowed = ", ".join(map(repr, sorted(FORMATS)))
            sentence = f"invalid choice: {value!r} (choose from {allowed}, or package.module:Name)"
            raise argparse.ArgumentError(self, sentence)
        setattr(namespace, self.dest, value)


def add_settings_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option for what single formats ask."""
    keys = ", ".join(SETTINGS)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help=f"{keys} (docs/formats.md); repeatable")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of verbs that write a checkpoint."""
    add = parser.add_argument
    add("--file-size", type=parse_bytes, default=FILE_SIZE, metavar="SIZE", help="data per shard file (default 1G)")
    add("--digest", choices=sorted(ALGORITHMS), default=DEFAULT, help=f"of native output (default {DEFAULT})")
    add("--on-drift", choices=("error", "first", "mean"), default="error", help="where replicas in rank files differ")
    add("--dry-run", action="store_true", help="say what would be read and written, and stop")


def build_options(arguments: argparse.Namespace, comm: Communicator) -> Options:
    """Returns what the arguments ask for; ranks other than 0 are silent."""
    given = vars(arguments)
    return Options(
        max_memory=arguments.max_memory,
        file_size=given.get("file_size", FILE_SIZE),
        algorithm=given.get("digest", DEFAULT),
        verify=not arguments.no_verify,
        on_drift=given.get("on_drift", "error"),
        world=given.get("world") or 0,
        extra=dict(text.partition("=")[::2] for text in given.get("set") or []),
        comm=comm,
        report=print if comm.rank == 0 else lambda text: None,
    )

"""The command line of the launcher."""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from launcher.env import MOST_RANKS
from launcher.failure.line import LOST_SECONDS

USAGE = (
    "python -m launcher [-n 2 | --hostfile H | nothing, inside a scheduler's allocation] [options] "
    "-- -m module ARGS | script.py ARGS"
)
_EXAMPLES = """examples:
  four ranks on this machine:
    python -m launcher -n 4 -- -m swin_moe.train digits_swin_moe
  inside a scheduler's allocation, or with a hostfile: what would run where, and the command
    python -m launcher --hostfile hosts --dry-run -- train.py --lr 1e-3
  started again after a failure, on what is left, with one file a rank of what it wrote
    python -m launcher --hostfile hosts --restarts 5 --allowed-ranks 32,24,16 --log-dir logs -- -m swin_moe.train CONFIG

`python -m launcher script --help`: the batch script of a scheduler instead."""
BACKOFF = 5.0  # seconds
PREFLIGHT_SECONDS = 120.0
_LONGEST_LOST = 86_400.0  # what the kernel's probes can be stretched to (tcp(7): 32,767 s, of which there are three)


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one sentence that names the option."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, _whole_number)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Returns the value of an option's words; raises for blank ones (empty ones: parse_known_args)."""
        if action.option_strings and not all(map(str.strip, arg_strings)):
            raise argparse.ArgumentError(action, f"needs a value, got {' '.join(arg_strings)!r}")
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Writes all of it: argparse's own drops the error of a pipe that nobody reads, as if all had been read."""
        (file or sys.stderr).write(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns what argparse's does. Raises ValueError for an empty word: an unset variable of a shell script."""
        words = sys.argv[1:] if args is None else args
        for number, word in enumerate(words):
            if re.fullmatch("--[^=]+=", word):
                self.error(f"{word} has no value; give one, or leave it out")
            if not word:
                before = words[number - 1] if number else "the command"
                self.error(f"{before} is followed by an empty word; give a value, or leave it out")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        words = " ".join(message.split())[:300]
        if re.match(r"unrecognized arguments: [^-]", words):  # words of the program
            words += "; the program and its words stand after --, as in: -- -m swin_moe.train CONFIG"
        raise ValueError(f"{words}; {self.prog} --help says more")


def _whole_number(text: str) -> int:
    """Returns an option's number; raises ValueError, as int does, for one that no MPI or scheduler could take."""
    number = int(text)
    if abs(number) > MOST_RANKS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_RANKS}, got {text}")
    return number


_whole_number.__name__ = "int"  # argparse says "invalid int value"


def parser() -> Parser:
    """Returns the parser of what stands before the dashes."""
    made = Parser(
        prog="python -m launcher", usage=USAGE, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(made)
    return made


def add_options(made: Parser) -> list[argparse.Action]:
    """Returns the options, which are the parser's now, in groups."""
    add = made.add_argument_group("where the ranks run").add_argument
    where = [
        add("-n", "--ranks", type=int, help="number of ranks (default: as many as the hosts take, 1 without hosts)"),
        add("--hostfile", default="", help="file with a host per line: host, host:4, host slots=4 or n[01-04]:4"),
        add("--exclude", action="append", default=[], metavar="HOSTS", help="hosts to leave out: n03,n[07-09]"),
        add("--mpi", default="", metavar="MPIRUN", help="mpirun, mpiexec or srun (default: this environment's mpirun)"),
        add("--no-bind", action="store_true", help="do not bind each rank to its share of the cores"),
        add("--no-compare", action="store_true", help="do not compare every rank's software and clock with rank 0's"),
    ]
    return [*where, *_add_environment(made), *_add_preflight(made), *_add_ends(made), *_add_output(made)]


def _add_environment(made: Parser) -> list[argparse.Action]:
    add = made.add_argument_group("what the ranks get (these may be repeated)").add_argument
    return [
        add("--env", action="append", default=[], metavar="NAME=VALUE", help="set for every rank"),
        add(
            "--forward",
            action="append",
            default=[],
            metavar="NAME",
            help="a variable, or a pattern such as 'WANDB_*', that reaches every rank on every host even if its name "
            "looks like a secret's",
        ),
    ]


def _add_preflight(made: Parser) -> list[argparse.Action]:
    add = made.add_argument_group("what is checked first").add_argument
    return [
        add("--preflight", action="store_true", help="check hosts and links first; without a program, only that"),
        add("--preflight-file", default="", metavar="FILE", help="for its figures (default: --log-dir/preflight.json)"),
        add(
            "--preflight-over",
            default="auto",
            choices=("auto", "nccl", "gloo", "mpi", "none"),
            help="what its collectives run over (default: the first that all ranks have)",
        ),
        add(
            "--preflight-limit",
            type=float,
            default=PREFLIGHT_SECONDS,
            metavar="SECONDS",
            help=f"how long it waits for a rank to come, or to answer (default {PREFLIGHT_SECONDS:g})",
        ),
    ]


def _add_ends(made: Parser) -> list[argparse.Action]:
    add = made.add_argument_group("how a job ends, and begins again").add_argument
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    return [
        add("--grace", default=120.0, help="that ranks get to save after a request (default 120)", **seconds),
        add(
            "--save-after",
            default=math.inf,
            help="ask the ranks to save and leave then, as a SIGTERM does; for schedulers that give no warning",
            **seconds,
        ),
        add(
            "--stall",
            default=600.0,
            help="how long a rank may be stopped, or keep the others waiting while they start (default 600)",
            **seconds,
        ),
        add(
            "--lost",
            help=f"how long a host may not answer, before it is lost (default {LOST_SECONDS:g}, or --stall if less)",
            **seconds,
        ),
        add("--restarts", type=int, default=0, metavar="K", help="failures after which the job is started again (0)"),
        add("--backoff", help=f"before a restart, twice as long each time (default {BACKOFF:g})", **seconds),
        add("--min-ranks", type=int, metavar="M", help="fewest to start again with (default: all, none may be lost)"),
        add("--allowed-ranks", default="", metavar="LIST", help="numbers that the program's layout allows: 32,24,16"),
    ]


def _add_output(made: Parser) -> list[argparse.Action]:
    add = made.add_argument_group("what is shown and kept").add_argument
    return [
        add(
            "--log-dir",
            default="",
            metavar="DIR",
            help="a folder all hosts see: what every rank wrote (DIR/start-0/rank-00012.log), failures, stacks",
        ),
        add("--tag", action="store_true", help="every line tells its rank (default: those of ranks other than 0)"),
        add("--quiet", action="store_true", help="do not print where the ranks run"),
        add("--dry-run", action="store_true", help="print where the ranks would run and the command, and stop"),
    ]


def given(actions: Sequence[argparse.Action], options: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the words of each option that is not as it would be without: {"log_dir": ["--log-dir", "logs"]}."""
    found: dict[str, list[str]] = {}
    for action in actions:
        value, name = getattr(options, action.dest), action.option_strings[-1]
        if value == action.default:
            continue
        values = value if isinstance(value, list) else [value]
        found[action.dest] = [name] if value is True else [word for one in values for word in (name, _word(one))]
    return found


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns (the launcher's own arguments, the program and its)."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def parse_environment(pairs: list[str]) -> dict[str, str]:
    """Returns the variables of --env NAME=VALUE. Raises ValueError for what is no pair."""
    for pair in pairs:
        if not re.fullmatch(r"[^=\s]+=.*", pair, re.DOTALL):
            raise ValueError(f"--env takes NAME=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError, one sentence, for options that cannot be or contradict each other."""
    parse_environment(options.env)
    for name in ("restarts", "backoff", "min_ranks", "grace", "save_after"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {value}")
    for name in ("stall", "preflight_limit"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0 seconds, got {getattr(options, name):g}")
    if not 0 < lost_seconds(options) <= _LONGEST_LOST:
        raise ValueError(f"--lost must be more than 0 and at most {_LONGEST_LOST:g} seconds, got {options.lost:g}")
    if not (options.preflight or options.preflight_file):
        for name, usual in (("preflight_over", "auto"), ("preflight_limit", PREFLIGHT_SECONDS)):
            if getattr(options, name) != usual:
                raise ValueError(f"--{name.replace('_', '-')} is for checks before the program; it needs --preflight")
    allowed, least = allowed_ranks(options), options.min_ranks
    if allowed == []:
        raise ValueError(f"--allowed-ranks takes numbers such as 32,24,16, got {options.allowed_ranks!r}")
    for name in ("backoff", "min_ranks", "allowed_ranks"):
        if getattr(options, name) not in (None, "") and not options.restarts:
            raise ValueError(f"--{name.replace('_', '-')} is for a job that is started again; it needs --restarts")
    if allowed and least is not None and allowed[0] < least:
        raise ValueError(f"--min-ranks {least} is more than any of --allowed-ranks {options.allowed_ranks}")


def lost_seconds(options: argparse.Namespace) -> float:
    """Returns after how many seconds without an answer a host counts as lost."""
    return min(LOST_SECONDS, options.stall) if options.lost is None else float(options.lost)


def check_ranks(options: argparse.Namespace, ranks: int) -> None:
    """Raises ValueError where a job of so many ranks is none that --allowed-ranks and --min-ranks let start."""
    allowed = allowed_ranks(options)
    if allowed and ranks not in allowed:
        raise ValueError(f"a job of {ranks} rank{'s' * (ranks > 1)} is none of --allowed-ranks {options.allowed_ranks}")
    if (options.min_ranks or 0) > ranks:
        raise ValueError(f"--min-ranks {options.min_ranks} is more than the job's {ranks}")


def make_log_folder(options: argparse.Namespace) -> None:
    """Makes the folder of --log-dir. Raises ValueError where it cannot, or nothing can be written there."""
    if options.log_dir:
        try:
            Path(options.log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--log-dir {options.log_dir!r} cannot be made: {error.strerror}") from error
        if not os.access(options.log_dir, os.W_OK | os.X_OK):
            raise ValueError(f"--log-dir {options.log_dir!r} cannot be written to; name a folder of your own")


def allowed_ranks(options: argparse.Namespace) -> list[int] | None:
    """Returns the numbers of ranks that the program's layout allows, largest first; [] = unreadable, None = any."""
    if not options.allowed_ranks:
        return None
    words = options.allowed_ranks.split(",")
    return sorted(map(int, words), reverse=True) if all(w.isdigit() and int(w) for w in words) else []

"""The command line of the launcher."""

import argparse
import math
from typing import NoReturn

USAGE = (
    "python -m launcher [-n 2 | --hostfile H | nothing, inside a scheduler's allocation] [options] "
    "-- -m module ARGS | script.py ARGS"
)


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one sentence that names the option."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{' '.join(message.split())[:300]}; {self.prog} --help says more")


def parser() -> Parser:
    """Returns the parser of what stands before the dashes."""
    made = Parser(prog="python -m launcher", usage=USAGE)
    add = made.add_argument
    add("-n", "--ranks", type=int, help="number of ranks (default: as many as the hosts take, 1 without hosts)")
    add("--hostfile", default="", help="file with a host per line: host, host:4, host slots=4 or n[01-04]:4")
    add("--exclude", action="append", default=[], metavar="HOSTS", help="hosts to leave out: n03,n[07-09]")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="set for every rank; may be repeated")
    add(
        "--forward",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable, or a pattern such as 'WANDB_*', "
        "that reaches every rank on every host even if its name looks like a secret's; may be repeated",
    )
    add("--mpi", default="", metavar="MPIRUN", help="a system's mpirun, mpiexec or srun (default: this environment's)")
    add("--grace", type=float, default=120.0, help="seconds ranks get to save after SIGTERM (default 120)")
    add(
        "--save-after",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="ask the ranks to save and leave then, as a SIGTERM does; for schedulers that give no warning",
    )
    add(
        "--stall",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a rank may be stopped, or keep the others waiting while they start (default 600)",
    )
    add("--log-dir", default="", metavar="DIR", help="a folder all hosts see, for word of failures and stacks of ranks")
    add(
        "--restarts", type=int, default=0, metavar="K", help="failures after which the job is started again (default 0)"
    )
    add("--backoff", type=float, default=5.0, metavar="SECONDS", help="before a restart, twice as long each time")
    add("--min-ranks", type=int, metavar="M", help="fewest ranks to start again with (default: all, none may be lost)")
    add("--allowed-ranks", default="", metavar="LIST", help="numbers of ranks the program's layout allows: 32,24,16")
    add("--preflight", action="store_true", help="check hosts and links first; without a program, only that")
    add("--preflight-file", default="", metavar="FILE", help="for its figures (default: preflight.json in --log-dir)")
    add(
        "--preflight-over",
        default="auto",
        choices=("auto", "nccl", "gloo", "mpi", "none"),
        help="what its collectives run over (default: the first that all ranks have)",
    )
    add(
        "--preflight-limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long it waits for a rank to come, or to answer (default 120)",
    )
    add("--no-bind", action="store_true", help="do not bind each rank to its share of the cores")
    add("--tag", action="store_true", help="begin every line of output with its rank")
    add("--no-compare", action="store_true", help="do not compare every rank's software and clock with rank 0's")
    add("--quiet", action="store_true", help="do not print where the ranks run")
    add("--dry-run", action="store_true", help="print where the ranks would run and the command, and stop")
    return made


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns (the launcher's own arguments, the program and its)."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def parse_environment(pairs: list[str]) -> dict[str, str]:
    """Returns the variables of --env NAME=VALUE. Raises ValueError for what is no pair."""
    for pair in pairs:
        if not pair.partition("=")[0] or "=" not in pair:
            raise ValueError(f"--env takes NAME=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)

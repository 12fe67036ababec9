"""`python -m launcher script --scheduler slurm ... -- PROGRAM`: writes the batch script of a job, one file to read."""

import argparse
import os
import re
import sys
from pathlib import Path

from launcher.command import Job
from launcher.job.options import Parser, add_options, check, check_ranks, given, split_at_dashes
from launcher.job.program import check_program
from launcher.schedulers import SCHEDULERS
from launcher.schedulers.base import Batch, Scheduler, time_to_save

_USAGE = (
    "python -m launcher script --scheduler slurm|pbs|lsf|flux|k8s --nodes 2 --ranks-per-node 4 --time 8:00:00 "
    "[options] [launcher options] -- -m module ARGS | script.py ARGS"
)
# The launcher's options that the script settles by itself.
_SETTLED = {
    "ranks": "-n has no place in a script: its ranks are --nodes times --ranks-per-node",
    "hostfile": "--hostfile has no place in a script: its hosts are those that the scheduler gives",
    "grace": "--grace follows from --warning in a script",
    "save_after": "--save-after follows from --time and --warning in a script",
    "dry_run": "--dry-run has no place in a script: writing one starts nothing",
}
_LONGEST_NAME = 63  # of a Kubernetes object; OpenPBS takes 236 characters (pbs_job_attributes(7B))


def main(arguments: list[str]) -> int:
    """Returns 0 having written the script; 2 with one sentence on stderr where there can be none."""
    try:
        options, scheduler, batch = _read(arguments)
        text = scheduler.script(batch)
        if not options.output:
            print(text, end="")
            return 0
        _write(Path(options.output), text)
    except ValueError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return 2
    print(f"launcher: written; start it with: {scheduler.submit} {options.output}", file=sys.stderr)
    return 0


def parse(arguments: list[str]) -> tuple[int, list[str]]:
    """Returns (ranks, program) that a script of these arguments starts, for a caller that checks the program's own.

    Raises:
        ValueError: As `main` says in one sentence; and for a container, which may have other files than this host.
    """
    _, _, batch = _read(arguments)
    if batch.image:
        raise ValueError("a container has files of its own")
    return batch.nodes * batch.ranks_per_node, list(batch.program)


def parse_time(text: str) -> int:
    """Returns the seconds of 90 (minutes), 1:30:00, 1-12:00:00 (days), 90m, 36h or 2d. Raises ValueError for others."""
    if re.search(r"\d{10}", text):
        raise ValueError(f"--time takes at most nine digits in a row, got {text[:300]!r}")
    match = re.fullmatch(r"(\d+)([smhd]?)", text)
    if match:
        seconds = int(match[1]) * {"s": 1, "": 60, "m": 60, "h": 3600, "d": 86400}[match[2]]
    else:
        match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d)(?::([0-5]\d))?", text)
        if not match:
            raise ValueError(f"--time takes minutes, h:mm:ss, d-hh:mm:ss, 36h or 2d, got {text!r}")
        days, first, second, third = (int(part or 0) for part in match.groups())
        seconds = days * 86400 + first * 3600 + second * 60 + third
        if match[4] is None and match[1] is None:
            raise ValueError(f"--time {text!r} could be minutes or hours; write h:mm:ss, 36h or 90m")
    return seconds


def _read(arguments: list[str]) -> tuple[argparse.Namespace, Scheduler, Batch]:
    own, program = split_at_dashes(arguments)
    parser = _parser()
    passed = add_options(parser)
    options = parser.parse_args(own)
    scheduler = next(row for row in SCHEDULERS if row.name == options.scheduler)
    return options, scheduler, _batch(options, scheduler, program, _own(passed, options))


def _batch(options: argparse.Namespace, scheduler: Scheduler, program: list[str], own: dict[str, list[str]]) -> Batch:
    Job(None, program).check()
    check_program(program, {})
    for name in ("nodes", "ranks_per_node", "cores_per_rank"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.gpus_per_node < 0:
        raise ValueError(f"--gpus-per-node must be at least 0, got {options.gpus_per_node}")
    for name in ("queue", "account", "image"):
        if re.search(r"[\s\x00-\x1f\x7f]", getattr(options, name)):
            raise ValueError(f"--{name} is one word, got {getattr(options, name)[:300]!r}")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", options.name) or len(options.name) > _LONGEST_NAME:
        raise ValueError(
            f"--name takes at most {_LONGEST_NAME} of a-z, 0-9 and -, a letter first, got {options.name!r}"
        )
    seconds = parse_time(options.time)
    if not 0 < options.warning < seconds:
        raise ValueError(f"--warning must be within the time limit of {seconds} s, got {options.warning} s")
    kind = options.kind or scheduler.kinds[0]
    if kind not in scheduler.kinds:
        known = ", ".join(filter(None, scheduler.kinds)) or "none"
        raise ValueError(f"--kind {kind!r} is none of {scheduler.title}'s kinds: {known}")
    if bool(options.image) != (scheduler.name == "k8s"):
        raise ValueError("--image names the container of --scheduler k8s, and is needed there and only there")
    if own and kind in scheduler.without_launcher:
        raise ValueError(f"--kind {kind} does not start the launcher, so {own.popitem()[1][0]} cannot be passed on")
    check(options)
    check_ranks(options, options.nodes * options.ranks_per_node)
    words = ["--grace", str(time_to_save(options.warning)), *(word for words in own.values() for word in words)]
    file = str(Path(options.output or f"{options.name}{scheduler.suffix}").absolute())
    return Batch(
        options.name,
        options.nodes,
        options.ranks_per_node,
        options.cores_per_rank,
        options.gpus_per_node,
        seconds,
        options.warning,
        os.getcwd(),
        options.python,
        tuple(words),
        tuple(program),
        file,
        options.queue,
        options.account,
        options.image,
        kind,
    )


def _own(passed: list[argparse.Action], options: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the words of the launcher's options that were given. Raises ValueError for one the script settles."""
    found = given(passed, options)
    for name, sentence in _SETTLED.items():
        if name in found:
            raise ValueError(sentence)
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ValueError(f"--output {str(path)!r} cannot be written: {error.strerror}") from error


def _parser() -> Parser:
    parser = Parser(
        prog="python -m launcher script",
        usage=_USAGE,
        epilog="The launcher's own options stand in the script as given.",
    )
    add = parser.add_argument
    add("--scheduler", required=True, choices=[row.name for row in SCHEDULERS])
    add("--nodes", type=int, default=1, help="hosts (default 1)")
    add("--ranks-per-node", type=int, default=1, help="ranks on each (default 1)")
    add("--cores-per-rank", type=int, default=1, help="cores of each rank (default 1)")
    add("--gpus-per-node", type=int, default=0, help="GPUs of each host (default 0)")
    add("--time", default="1:00:00", help="time limit: minutes, h:mm:ss, d-hh:mm:ss, 36h or 2d (default 1:00:00)")
    add(
        "--warning", type=int, default=300, metavar="SECONDS", help="ask the ranks to save so long before (default 300)"
    )
    add("--name", default="train", help="of the job (default train)")
    add("--queue", default="", help="partition or queue")
    add("--account", default="", help="whose time is used")
    add("--kind", default="", help="k8s: mpijob (default) or pytorchjob")
    add("--image", default="", help="k8s: the container, with this program in its working directory")
    add("--python", default=sys.executable, help="the interpreter there (default: this one)")
    add("--output", "-o", default="", metavar="FILE", help="where to write (default: standard output)")
    return parser

"""`python -m launcher -n 2 -- -m module ARGS`: starts a program on many ranks and ends them together."""

import argparse
import sys
import time

from launcher import restart
from launcher.failure.kinds import HOST
from launcher.job.options import check, check_ranks, make_log_folder, parser, split_at_dashes
from launcher.job.prepare import Prepared, prepare, ranks_of
from launcher.unread import until_unread

CHECKS = ("-m", "launcher.preflight")  # stands for a program where there is only --preflight


def main(arguments: list[str] | None = None) -> int:
    """Returns the job's exit code; 2 with one sentence on stderr where the job cannot start."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["script"]:
        from launcher import script  # its own options, and nothing is started

        return script.main(arguments[1:])
    own, program = split_at_dashes(arguments)
    try:
        options = parser().parse_args(own)
        check(options)
        if options.preflight or options.preflight_file:
            from launcher.preflight import start  # costs every other start of the launcher 30 ms

            options.preflight = True
            start.check(options)
        if not options.dry_run:
            options.env += restart.own_variables(options)
        job = prepare(options, program or [*CHECKS] if options.preflight else program)
        check_ranks(options, len(job.plan.ranks))
        if not options.dry_run:
            make_log_folder(options)
    except ValueError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return 2
    if not options.quiet:
        print("\n".join(job.describe()), file=sys.stderr, flush=True)
    if options.dry_run:
        print("\n".join(job.shell_lines()))
        return 0
    if options.preflight:
        code, job = check_first(job, options)
        if code or not program:
            return code
    return restart.run(job, options)


def check_first(job: Prepared, options: argparse.Namespace) -> tuple[int, Prepared]:
    """Returns (0 where the job may start after --preflight, else its exit code; the job that may)."""
    from launcher.preflight import start

    began = time.monotonic()
    try:
        return start.run(job, options)
    except ValueError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return HOST, job
    finally:
        options.save_after -= time.monotonic() - began  # the scheduler's limit counts from here, too


def parse(arguments: list[str]) -> tuple[int, list[str]]:
    """Returns (ranks, program) that the arguments ask for, for a caller that checks the program's own arguments.

    Raises:
        ValueError: As `main` says in one sentence; and for a script whose program runs in a container.
    """
    if arguments[:1] == ["script"]:
        from launcher import script

        return script.parse(arguments[1:])
    own, program = split_at_dashes(arguments)
    options = parser().parse_args(own)
    check(options)
    return options.ranks if options.ranks is not None else ranks_of(options), program


if __name__ == "__main__":
    sys.exit(until_unread(main))

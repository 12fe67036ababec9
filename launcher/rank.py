"""Runs a program as one rank: `mpirun -n 2 python -m launcher.rank -m package.module ARGS` or `... script.py ARGS`."""

import os
import runpy
import sys

from launcher import guard, mpi
from launcher.output import pump


def run_program(arguments: list[str]) -> None:
    """Runs "-m module ARGS" or "script.py ARGS" as __main__, the way the interpreter itself would."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    pump.write_lines_at_once()
    guard.run(lambda: mpi.call(lambda: run_program(sys.argv[1:]), says_why=False))

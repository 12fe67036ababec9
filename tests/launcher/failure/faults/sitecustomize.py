"""Imported by the interpreter of every rank of the fault matrix (PYTHONPATH), before the launcher's own code."""

import os
import sys

from tests.launcher.failure import fault_program

if sys.orig_argv[1:3] == ["-m", "launcher.rank"]:
    fault_program.prepare(os.environ)

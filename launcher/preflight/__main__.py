"""`mpirun -n 4 python -m launcher.preflight`: checks the ranks that are there, whoever started them."""

import sys

from launcher import ending, mpi
from launcher.failure.kinds import CONFIGURATION
from launcher.preflight.conduct import Settings
from launcher.preflight.rank import on_ranks


def main() -> None:
    """Ends with the checks' exit code."""
    try:
        code, _ = on_ranks(mpi.bootstrap(), Settings())
    except ValueError as error:
        ending.fail(f"launcher: {error}", CONFIGURATION)
    sys.exit(code)


if __name__ == "__main__":
    mpi.call(main)

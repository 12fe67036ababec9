"""`mpirun -n 4 python -m launcher.preflight`: checks the ranks that are there, whoever started them."""

import sys

from launcher import mpi
from launcher.preflight.conduct import Settings
from launcher.preflight.rank import on_ranks

if __name__ == "__main__":
    mpi.call(lambda: sys.exit(on_ranks(mpi.bootstrap(), Settings())[0]))

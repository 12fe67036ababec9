"""How each MPI is recognized, and the command line it gets, against the flags its manual documents."""

import re
import signal
import sys

import pytest

from launcher import flavors
from launcher.command import Job, Mpi, build_command
from launcher.flavors.base import Start
from launcher.hosts.hostfile import Host

PROGRAM = ["-m", "package.module", "a=1"]
RANK = [sys.executable, "-m", "launcher.rank", *PROGRAM]
BY_NAME = {flavor.name: flavor for flavor in flavors.FLAVORS}

# What each says of itself, as installed versions and the documentation have it (hydra's is longer).
VERSIONS = {
    "mpich": "HYDRA build details:\n    Version:  5.0.2\n    Configure options:  --with-device=ch4:ucx,ofi",
    "mvapich": "HYDRA build details:\n    Version: 4.3.0\n    Configure options: --prefix=/opt/mvapich-4.0",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626 (id: b44796a)",
    "openmpi4": "mpirun.openmpi (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/",
    "openmpi5": "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/",
    "pals": "mpiexec version 1.8.0 revision",
    "srun": "slurm-wlm 22.05.8",
}
FURTHER_VERSIONS = [
    ("openmpi4", "mpirun (Open MPI) 4.1.4"),
    ("openmpi4", "mpirun (Open MPI) 3.1.6"),
    ("openmpi5", "prterun (PRRTE) 3.0.9"),
    ("openmpi5", "mpirun (Open MPI) 10.0.1"),
    ("mvapich", "HYDRA build details:\n    Version: 3.2\n    Configure options: --with-device=ch3:mrail"),
    ("srun", "slurm 24.11.0"),
]

# Options of each manual that a command line here may use (sources: the docstrings of launcher/flavors).
DOCUMENTED = {
    "mpich": "-n -f -genvall -wdir -bind-to -prepend-rank",
    "mvapich": "-n -f -genvall -wdir -bind-to -prepend-rank",
    "intel": "-n -machinefile -genvall -wdir -silent-abort -prepend-rank",
    "openmpi4": "-n --quiet --mca --map-by --bind-to --wdir --tag-output --hostfile -x",
    "openmpi5": "-n --map-by --bind-to --wdir --output --hostfile -x",
    "pals": "-n --cpu-bind --envall --wdir --hostfile --ppn --label",
    "srun": "--ntasks --ntasks-per-node --nodes --distribution --nodelist --cpu-bind --overcommit --export --chdir"
    " --input --kill-on-bad-exit --quiet --mpi --label",
}

# (options of two ranks here, options of 3 ranks on a:2 and b:1 with lines tagged and the variable A)
LINES = {
    "mpich": (
        "-n 2 -genvall -wdir /d -bind-to none",
        "-n 3 -f F -genvall -wdir /d -bind-to none -prepend-rank",
    ),
    "mvapich": (
        "-n 2 -genvall -wdir /d -bind-to none",
        "-n 3 -f F -genvall -wdir /d -bind-to none -prepend-rank",
    ),
    "intel": (
        "-n 2 -genvall -wdir /d -silent-abort",
        "-n 3 -machinefile F -genvall -wdir /d -silent-abort -prepend-rank",
    ),
    "openmpi4": (
        "-n 2 --quiet --mca odls_base_sigkill_timeout 0 --map-by slot:OVERSUBSCRIBE --bind-to none --wdir /d -x A",
        "-n 3 --quiet --mca odls_base_sigkill_timeout 0 --map-by slot:OVERSUBSCRIBE --bind-to none --wdir /d"
        " --tag-output --hostfile F -x A",
    ),
    "openmpi5": (
        "-n 2 --map-by slot:OVERSUBSCRIBE --bind-to none --wdir /d -x A",
        "-n 3 --map-by slot:OVERSUBSCRIBE --bind-to none --wdir /d --output tag --hostfile F -x A",
    ),
    "pals": (
        "-n 2 --cpu-bind none --envall --wdir /d",
        "-n 3 --cpu-bind none --envall --wdir /d --hostfile F --label",
    ),
    "srun": (
        "--ntasks=2 --cpu-bind=none --overcommit --export=ALL --chdir=/d --input=none --kill-on-bad-exit=1 --quiet"
        " --mpi=pmi2",
        "--ntasks=3 --nodes=2 --distribution=arbitrary --nodelist=a,a,b --cpu-bind=none --overcommit --export=ALL"
        " --chdir=/d --input=none --kill-on-bad-exit=1 --quiet --mpi=pmi2 --label",
    ),
}
HOSTFILES = {
    "mpich": "a:2\nb:1\n",
    "mvapich": "a:2\nb:1\n",
    "intel": "a:2\nb:1\n",
    "openmpi4": "a slots=2\nb slots=1\n",
    "openmpi5": "a slots=2\nb slots=1\n",
    "pals": "a\na\nb\n",
    "srun": "",
}
# Variables of the program that starts the ranks: no MPI binds ranks, as they bind themselves.
ENVIRONMENTS = {
    "intel": {"I_MPI_PIN": "off"},
    "mvapich": {"MVP_ENABLE_AFFINITY": "0", "MV2_ENABLE_AFFINITY": "0"},
}


def test_every_row_is_in_every_table():
    assert set(BY_NAME) == set(VERSIONS) == set(DOCUMENTED) == set(LINES)
    assert set(BY_NAME) == set(HOSTFILES)


@pytest.mark.parametrize("name, said", [*VERSIONS.items(), *FURTHER_VERSIONS])
def test_an_mpi_is_known_by_its_version(name, said, tmp_path):
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    program.chmod(0o755)
    assert flavors.detect(str(program)) == (str(program), BY_NAME[name])


def test_an_mpi_nobody_knows_is_refused_with_what_it_says(tmp_path):
    program = tmp_path / "mpirun"
    program.write_text("#!/bin/sh\necho LAM 7.1\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match=r"none of Open MPI 5, .*Cray PALS; .* --version says: 'LAM 7.1"):
        flavors.detect(str(program))


def test_the_aprun_of_pals_is_refused_for_it_has_other_options(tmp_path):
    program = tmp_path / "aprun"
    program.write_text("#!/bin/sh\necho aprun version 1.8.0 revision\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match="--version says: 'aprun version 1.8.0"):
        flavors.detect(str(program))


def test_the_script_of_intel_mpi_needs_no_path(tmp_path):
    for name, body in (("mpirun", "exec not-in-path-mpiexec.hydra"), ("mpiexec.hydra", "echo 'Intel(R) MPI Library'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    assert flavors.detect(str(tmp_path / "mpirun")) == (str(tmp_path / "mpiexec.hydra"), BY_NAME["intel"])


def command_of(name, monkeypatch, **start):
    """Returns (command line, variables) of the flavor for a user who is not root."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    mpi = Mpi("/x/mpirun", BY_NAME[name], pmi="pmi2" if name == "srun" else "")
    return build_command(Job(None, PROGRAM, environment={"A": "b c"}), mpi, Start("/x/mpirun", directory="/d", **start))


@pytest.mark.parametrize("name", BY_NAME)
def test_command_lines(name, monkeypatch):
    own = ENVIRONMENTS.get(name, {})
    alone, on_hosts = LINES[name]
    assert command_of(name, monkeypatch, ranks=2) == (["/x/mpirun", *alone.split(), *RANK], own | {"A": "b c"})
    hosts = (Host("a", 2), Host("b", 1))
    line, _ = command_of(name, monkeypatch, ranks=3, hosts=hosts, hostfile="F", tagged=True)
    assert line == ["/x/mpirun", *on_hosts.split(), *RANK]
    used = {word.partition("=")[0] for word in line[1 : -len(RANK)] if word.startswith("-")}
    assert used <= set(DOCUMENTED[name].split())


def test_srun_deals_equal_nodes_by_their_number(monkeypatch):
    hosts = (Host("a", 2), Host("b", 2))
    line, _ = command_of("srun", monkeypatch, ranks=4, hosts=hosts)
    assert line[1:5] == ["--ntasks=4", "--nodes=2", "--ntasks-per-node=2", "--nodelist=a,b"]
    assert not any("arbitrary" in word for word in line)


def test_srun_takes_more_hosts_than_an_argument_holds(monkeypatch):
    """Linux takes 128 KiB for one: ranges where hosts are alike, else a file."""
    hosts = tuple(Host(f"node{number:05d}", 8) for number in range(20_000))
    line, _ = command_of("srun", monkeypatch, ranks=160_000, hosts=hosts)
    assert "--nodelist=node[00000-19999]" in line and BY_NAME["srun"].hostfile(hosts) == ""
    unequal = (*hosts, Host("last", 2))
    text = BY_NAME["srun"].hostfile(unequal)
    assert text.splitlines()[:9] == ["node00000"] * 8 + ["node00001"] and text.endswith("9999\nlast\nlast\n")
    line, _ = command_of("srun", monkeypatch, ranks=160_002, hosts=unequal, hostfile="/t/F")
    assert "--nodelist=/t/F" in line and max(map(len, line)) < 100


def test_pals_deals_equal_hosts_by_their_number(monkeypatch):
    hosts = (Host("a", 2), Host("b", 2))
    line, _ = command_of("pals", monkeypatch, ranks=4, hosts=hosts, hostfile="F")
    assert line[1 : -len(RANK)] == "-n 4 --cpu-bind none --envall --wdir /d --hostfile F --ppn 2".split()
    assert BY_NAME["pals"].hostfile(hosts) == "a\nb\n"
    line, _ = command_of("pals", monkeypatch, ranks=3, hosts=(Host("a", 2), Host("b", 1)), hostfile="F")
    assert "--ppn" not in line


@pytest.mark.parametrize("name", HOSTFILES)
def test_hostfiles(name):
    assert BY_NAME[name].hostfile([Host("a", 2), Host("b", 1)]) == HOSTFILES[name]


def test_an_address_that_a_hostfile_cannot_hold_is_refused():
    for name in ("mpich", "intel", "mvapich"):
        with pytest.raises(ValueError, match="'fd00::1': Hydra takes no IPv6 address for a host"):
            BY_NAME[name].hostfile([Host("fd00::1", 2)])
    assert BY_NAME["openmpi4"].hostfile([Host("fd00::1", 2)]) == "fd00::1 slots=2\n"


def test_root_may_start_open_mpi(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    for name in ("openmpi4", "openmpi5"):
        environment = Mpi("mpirun", BY_NAME[name], "/lib/libmpi.so.40").environment
        assert environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
        assert environment["MPI4PY_LIBMPI"] == "/lib/libmpi.so.40"


def test_only_hydra_passes_sigterm_on():
    assert {name for name, flavor in BY_NAME.items() if flavor.stop == signal.SIGTERM} == {"mpich", "mvapich", "intel"}


def test_only_srun_must_live_to_end_its_ranks():
    assert {name for name, flavor in BY_NAME.items() if flavor.end != signal.SIGKILL} == {"srun"}


@pytest.mark.parametrize("module", [flavors.hydra, flavors.openmpi, flavors.pals, flavors.srun])
def test_every_file_cites_its_manual(module):
    assert re.search(r"Sources?: .*\d\.\d", module.__doc__, re.DOTALL)


@pytest.mark.parametrize("name", ["openmpi4", "openmpi5"])
def test_open_mpi_keeps_off_networks_that_hosts_do_not_share(name, tmp_path):
    keep_off = BY_NAME[name].keep_off
    environ = {"HOME": str(tmp_path)}
    mpirun, subnets = str(tmp_path / "prefix/bin/mpirun"), ["172.17.0.0/16", "10.5.0.0/16"]
    expected = {"OMPI_MCA_btl_tcp_if_exclude": "127.0.0.0/8,sppp,172.17.0.0/16,10.5.0.0/16"}
    assert keep_off(mpirun, subnets, environ) == expected
    assert keep_off(mpirun, subnets, environ | {"OMPI_MCA_btl_tcp_if_include": "eth0"}) == {}
    for file in (tmp_path / ".openmpi/mca-params.conf", tmp_path / "prefix/etc/openmpi-mca-params.conf"):
        file.parent.mkdir(parents=True)
        file.write_text("# interfaces\n btl_tcp_if_include = eth0\n")
        assert keep_off(mpirun, subnets, environ) == {}
        file.write_text("# btl_tcp_if_include = eth0\n")
        assert keep_off(mpirun, subnets, environ) == expected

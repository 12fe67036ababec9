"""Allocations as each scheduler's documentation describes them, against the hosts and ranks they mean."""

import pytest

from launcher import schedulers
from launcher.hosts.hostfile import Host
from launcher.hosts.place import place

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_TASKS_PER_NODE": "8(x2)"}


@pytest.mark.parametrize(
    "environ, name, hosts",
    [
        (SLURM | {"SLURM_NTASKS": "16"}, "slurm", [Host("gpu07", 8), Host("gpu08", 8)]),
        (SLURM | {"SLURM_TASKS_PER_NODE": "4,2", "SLURM_NTASKS": "6"}, "slurm", [Host("gpu07", 4), Host("gpu08", 2)]),
        (SLURM | {"SLURM_NTASKS_PER_NODE": "8"}, "slurm", [Host("gpu07", 8), Host("gpu08", 8)]),
        (SLURM | {"SLURM_GPUS_ON_NODE": "4"}, "slurm", [Host("gpu07", 4), Host("gpu08", 4)]),
        (SLURM, "slurm", [Host("gpu07", 1), Host("gpu08", 1)]),  # without tasks the counts are of cores
        ({"PBS_JOBID": "1.pbs", "PBS_NODEFILE": "a\na\nb\n"}, "pbs", [Host("a", 2), Host("b", 1)]),
        ({"LSB_JOBID": "1", "LSB_DJOB_HOSTFILE": "a\nb\na\n"}, "lsf", [Host("a", 2), Host("b", 1)]),
        ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "hostA 4 hostB 2"}, "lsf", [Host("hostA", 4), Host("hostB", 2)]),
        (
            SLURM
            | {
                "SLURM_STEP_ID": "0",
                "SLURM_NODEID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "1",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_NTASKS": "1",
                "SLURM_TASKS_PER_NODE": "1,1",
            },
            "slurm",
            [Host("gpu07", 1), Host("gpu08", 1)],
        ),  # srun -n1 of the launcher itself
        ({"FLUX_URI": "local:///run/flux"}, "flux", [Host("n1", None), Host("n2", None)]),
    ],
)
def test_allocations(environ, name, hosts, tmp_path):
    for variable in ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE"):
        if variable in environ:
            path = tmp_path / variable
            path.write_text(environ[variable])
            environ = environ | {variable: str(path)}
    if "FLUX_URI" in environ:
        flux = tmp_path / "flux"
        flux.write_text('#!/bin/sh\n[ "$*" = "getattr hostlist" ] && echo "n[1-2]"\n')
        flux.chmod(0o755)
        environ = environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    found = schedulers.allocation(environ)
    assert (found[0].name, found[1]) == (name, hosts)


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "1"}, {"PBS_NODEFILE": "/x"}, {"LSB_MCPU_HOSTS": "a 1"}])
def test_no_allocation(environ):
    assert schedulers.allocation(environ) is None


@pytest.mark.parametrize(
    "environ, sentence",
    [
        (SLURM | {"SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "3"}, "SLURM_TASKS_PER_NODE='3' and SLURM_JOB_NODELIST"),
        (
            SLURM
            | {
                "SLURM_STEP_ID": "0",
                "SLURM_NODEID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
                "SLURM_STEP_NUM_TASKS": "8",
            },
            "srun started this launcher as 8 tasks, each of which would",
        ),
        ({"PBS_JOBID": "1", "PBS_NODEFILE": "/missing"}, "PBS_NODEFILE='/missing' cannot be read"),
        ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "a 1 b"}, "LSB_MCPU_HOSTS must be pairs of a host and its slots"),
        ({"FLUX_URI": "x", "PATH": "/nowhere"}, "FLUX_URI is set, but flux getattr hostlist"),
    ],
)
def test_contradictions_are_named(environ, sentence, monkeypatch):
    monkeypatch.setenv("PATH", environ.get("PATH", "/bin"))
    with pytest.raises(ValueError, match=sentence):
        schedulers.allocation(environ)


@pytest.mark.parametrize(
    "ranks, slots, placed",
    [
        (None, [4, 2], [4, 2]),
        (None, [4, None], [4, 1]),
        (5, [4, 2], [4, 1]),
        (3, [4, 2], [3]),
        (5, [None, None], [3, 2]),
        (1, [None, None], [1]),
        (7, [None, 2, None], [3, 2, 2]),
        (2, [None, 2, None], [2]),
    ],
)
def test_place(ranks, slots, placed):
    hosts = [Host(f"n{number}", count) for number, count in enumerate(slots)]
    assert [host.slots for host in place(ranks, hosts)] == placed


def test_more_ranks_than_slots_are_refused():
    with pytest.raises(ValueError, match="-n 7, but 2 hosts take 6 ranks; ask for at most 6"):
        place(7, [Host("a", 4), Host("b", 2)])

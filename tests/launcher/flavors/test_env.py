"""Each launcher's environment, as its documentation and a look at real ranks give it, against the facts it means."""

import pytest

from launcher.env import (
    RankEnv,
    detect,
    export,
    parse_ready,
    parse_single,
    parse_slurm,
    speaks_first,
    tasks_of_node,
    without_world,
    world_size_of_mpi,
)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "HYDI_CONTROL_FD": "7"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
}
BATCH_SCRIPT = {name: SRUN[name] for name in SRUN if name != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "environ, kind",
    [
        (TORCHRUN, "ready"),
        (TORCHRUN | MPICH, "ready"),  # exported already
        (MPICH, "mpi"),
        (OPEN_MPI, "mpi"),
        (SRUN, "slurm"),
        (SRUN | MPICH, "mpi"),  # mpirun starts its proxies through srun
        (SRUN | {"PMIX_RANK": "0"}, "slurm"),
        (BATCH_SCRIPT, "single"),
        (SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}, "single"),  # the shell of salloc
        ({}, "single"),
        ({"RANK": "0"}, "single"),
    ],
)
def test_detect(environ, kind):
    assert detect(environ) == kind


def test_parse_ready_and_export_are_inverse():
    env = parse_ready(TORCHRUN)
    assert env == RankEnv(3, 4, 1, 2, "n1", 29500)
    exported = {}
    export(env, exported)
    assert exported == TORCHRUN


def test_parse_ready_without_local_ranks_means_one_host():
    environ = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert parse_ready(environ) == RankEnv(3, 4, 3, 4, "n1", 29500)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"MASTER_PORT": "99999"}, r"MASTER_PORT must be in \[1, 65535\], got 99999"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE must be a whole number"),
        ({"WORLD_SIZE": "9" * 25}, r"WORLD_SIZE must be in \[1, 2147483647\], got 9999999999999999999999999"),
    ],
)
def test_parse_ready_names_the_bad_variable(change, message):
    with pytest.raises(ValueError, match=message):
        parse_ready(TORCHRUN | change)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (MPICH | {"PMI_SIZE": "0"}, r"PMI_RANK must be in \[0, PMI_SIZE\), got PMI_RANK=0 and PMI_SIZE=0"),
        (MPICH | {"PMI_SIZE": "9" * 25}, r"PMI_SIZE must be in \[1, 2147483647\]"),
        (MPICH | {"PMI_SIZE": "9" * 5000}, "PMI_SIZE must be a whole number >= 0, got one of 5000 digits"),
        (MPICH | {"PMI_RANK": "2"}, "PMI_RANK=2 and PMI_SIZE=2"),
        (MPICH | {"PMI_RANK": "-1"}, "PMI_RANK must be a whole number"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "0"}, "OMPI_COMM_WORLD_RANK=0 and OMPI_COMM_WORLD_SIZE=0"),
        (SRUN | {"SLURM_NTASKS": "5"}, "SLURM_PROCID=5 and SLURM_NTASKS=5"),
    ],
)
def test_a_rank_outside_its_world_is_refused(environ, said):
    with pytest.raises(ValueError, match=said):
        world_size_of_mpi(environ)


def test_a_task_outside_its_step_is_refused():
    with pytest.raises(ValueError, match="SLURM_PROCID=5 and SLURM_NTASKS=5"):
        parse_slurm(SRUN | {"SLURM_NTASKS": "5"})


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 is set, but MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
    ],
)
def test_half_a_world_is_refused(environ, said):
    with pytest.raises(ValueError, match=said):
        parse_single(environ)


def test_what_one_process_of_one_inherits_is_no_world():
    assert parse_single({"RANK": "3", "WORLD_SIZE": "1"}).world_size == parse_single({}).world_size == 1


@pytest.mark.parametrize(
    ("environ", "first"),
    [
        ({}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "x"}, True),
        (TORCHRUN, False),
        (TORCHRUN | {"RANK": "0"}, True),
        ({"WORLD_SIZE": "x"}, True),
    ],
)
def test_who_says_what_all_ranks_would_say(environ, first):
    assert speaks_first(environ) == first


def test_parse_slurm():
    assert parse_slurm(SRUN) == RankEnv(5, 6, 1, 2, "gpu07", 20000 + 1234 * 7)


@pytest.mark.parametrize(
    "environ, tasks",
    [
        (SRUN, 2),
        (SRUN | {"SLURM_NODEID": "0"}, 4),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "6", "PMI_FD": "9"}, 2),
        (SRUN | MPICH, None),
        (SRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
        (BATCH_SCRIPT, None),
        (TORCHRUN, None),
        (SRUN | {"SLURM_STEP_ID": "4294967290"}, None),
    ],
)
def test_tasks_of_this_node(environ, tasks):
    assert tasks_of_node(environ) == tasks


def test_parse_slurm_on_one_host_stays_on_the_loopback():
    one = SRUN | {"SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0"}
    assert parse_slurm(one).master_addr == "127.0.0.1"
    assert parse_slurm(one).local_world_size == 6


def test_a_new_world_inherits_nothing_of_the_old_one():
    kept = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "1", "OMPI_MCA_btl": "tcp", "MPI4PY_LIBMPI": "x"}
    assert without_world(TORCHRUN | MPICH | OPEN_MPI | kept) == kept

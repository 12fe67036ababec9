"""Every fault in every phase under every MPI (fault_matrix.py): a covering dozen here, all of them with --full."""

import pytest

from tests.launcher.failure.fault_cells import FAULTS, STARTERS, Cell, cells, problems, table, training_cells
from tests.launcher.failure.fault_cells import Result as Came
from tests.launcher.failure.fault_matrix import checkpoints, run_cell, why_not_here
from tests.launcher.failure.fault_program import PHASES

# Every fault once, and every phase and MPI; those that were wrong once, where one fault has several to choose from.
COVERING = {
    ("exception", "saving", "openmpi"),
    ("exit(0)", "steady state", "srun"),
    ("exit(3)", "rendezvous", "mpich"),
    ("SIGKILL of a rank", "first step", "srun"),
    ("SIGSTOP of a rank", "import", "mpich"),
    ("out of memory", "steady state", "openmpi"),
    ("disk full", "saving", "mpich"),
    ("SIGKILL of the launcher", "rendezvous", "openmpi"),
    ("SIGTERM of the launcher", "import", "srun"),
    ("SIGHUP of the launcher", "steady state", "openmpi"),
    ("SIGKILL of mpirun", "steady state", "mpich"),
    ("SIGTERM of mpirun", "first step", "openmpi"),
    ("SIGKILL of the daemon", "saving", "srun"),
    ("SIGTERM of the daemon", "import", "openmpi"),
}
SLACK = 3  # of promised times: tests share a machine of few cores


SAVED = {
    "import": 0,
    "rendezvous": 0,
    "first step": 0,
    "saving": 1,
    "steady state": 2,
}  # by the trainer before the fault


def name_of(cell):
    return str(cell).replace(", ", "-").replace(" ", "_")


def key(cell):
    return cell.fault.name, cell.phase, cell.starter


def test_the_dozen_covers_every_fault_phase_and_starter():
    assert {key(cell) for cell in cells()} >= COVERING
    axes = [{one[axis] for one in COVERING} for axis in range(3)]
    assert axes == [{fault.name for fault in FAULTS}, set(PHASES), set(STARTERS)] and len(COVERING) == len(FAULTS)
    assert len(cells()) == ((len(FAULTS) - 1) * len(PHASES) + 1) * len(STARTERS)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=name_of(cell), marks=[] if key(cell) in COVERING else [pytest.mark.full])
        for cell in cells()
    ],
)
def test_a_fault_ends_the_job_in_time_and_names_the_culprit(cell, request, tmp_path):
    if reason := why_not_here(cell):
        pytest.skip(reason)
    cluster = request.getfixturevalue("slurm") if cell.starter == "srun" else None
    result = run_cell(cell, tmp_path, cluster)
    assert problems(cell, result) == [], result.output
    assert cell.survives or result.seconds < SLACK * cell.fault.seconds, result.output


@pytest.mark.mpi
@pytest.mark.full
@pytest.mark.parametrize("cell", training_cells(), ids=name_of)
def test_a_fault_of_a_real_training_run_costs_no_checkpoint(cell, request, tmp_path):
    if reason := why_not_here(cell):
        pytest.skip(reason)
    cluster = request.getfixturevalue("slurm") if cell.starter == "srun" else None
    result = run_cell(cell, tmp_path, cluster)
    assert problems(cell, result) == [], result.output
    assert result.seconds < SLACK * cell.fault.seconds, result.output
    assert len(checkpoints(tmp_path)) == 1 + SAVED[cell.phase] + (cell.code == 75)


@pytest.mark.mpi
@pytest.mark.full
@pytest.mark.parametrize("starter", STARTERS)
def test_a_real_training_run_goes_on_after_its_writer_was_killed(starter, request, tmp_path):
    cell = cell_of("SIGKILL of a rank", "saving", starter, "training")
    if reason := why_not_here(cell):
        pytest.skip(reason)
    cluster = request.getfixturevalue("slurm") if starter == "srun" else None
    result = run_cell(cell, tmp_path, cluster, "--restarts", "1", "--backoff", "0.1")
    assert result.code == 0 and not result.left and not result.lost and not result.files, result.output
    assert "resumed from step 2" in result.output
    assert [path.name for path in checkpoints(tmp_path)[1:4]] == ["0000000002", "0000000004", "0000000006"]


def cell_of(fault, phase="steady state", starter="mpich", program="light"):
    return Cell(next(row for row in FAULTS if row.name == fault), phase, starter, program)


def test_what_is_wrong_with_a_cell_is_found():
    line = "launcher: program error (exit code 3): rank 1 (n, pid 7) failed first: exited with code 3"
    cell = cell_of("exit(3)")
    assert problems(cell, Came(1.0, 3, f"[rank 1] exited with code 3\n{line}\n")) == []
    assert problems(cell, Came(1.0, 3, f"{line.replace('rank 1', 'rank 0')}\n")) == ["names ranks [0]"]
    assert problems(cell, Came(1.0, 3, f"[rank 0] error: killed\n{line}\n")) == ["names ranks [0, 1]"]
    assert problems(cell, Came(1.0, 9, line)) == ["exit code 9, not 3"]
    assert problems(cell, Came(1.0, 3, f"{line}\nmore")) == ["names ranks []", "last line 'more'"]
    assert problems(cell, Came(1.0, 3, line, ["sleep 600"], ["checkpoint-1"], ["mpich_shm_1_0"])) == [
        "left running: ['sleep 600']",
        "lost: ['checkpoint-1']",
        "left in shared memory: ['mpich_shm_1_0']",
    ]
    host = "launcher: host (exit code 69): no rank said why"
    assert problems(cell_of("SIGKILL of mpirun"), Came(1.0, 69, host)) == []
    assert problems(cell_of("SIGKILL of mpirun"), Came(1.0, 69, f"[rank 1] error: killed\n{host}")) == [
        "names ranks [1]"
    ]


def test_codes_of_requests_to_end():
    assert [cell_of("SIGTERM of the launcher", phase).code for phase in PHASES] == [143, 143, 75, 75, 75]
    assert [cell_of("SIGTERM of mpirun", "saving", starter).code for starter in STARTERS] == [75, 69, 69]
    assert [cell_of("SIGTERM of the daemon", "saving", starter).code for starter in STARTERS] == [0, 69, 0]


def test_the_table_has_a_row_for_each_fault_and_starter():
    results = {cell_of("exit(3)", phase): Came(1.25, 3, "") for phase in PHASES}
    results[cell_of("SIGKILL of the launcher", "saving", "srun")] = Came(0.2, -9, "")
    assert table(results)[2:] == [
        "| exit(3) | mpich | 1.2 | 1.2 | 1.2 | 1.2 | 1.2 | 5 | 3 | the rank |",
        "| SIGKILL of the launcher | srun | - | - | - | - | 0.2 | 5 | 137 | - |",
    ]

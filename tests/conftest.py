"""Settings of the whole test suite: markers, one thread per process, the repository on the import path."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Threads of OpenMP that wait for work spin for it, and take the cores from what else the tests run: 18 CPU seconds
# instead of 4 where three threads attend small windows. Read once, when torch is imported; processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# Files that take longest, first: with pytest -n 3 --dist loadfile, what begins last must not leave the others idle.
# By the sums of `pytest --durations` on 2026-11-29; what takes under 8 seconds comes after them.
LONGEST = (
    "equivalence/test_engines.py",
    "training/test_compile.py",
    "tasks/test_layouts.py",
    "test_giant.py",
    "equivalence/test_expert_parallel.py",
    "csrc/window/test_window_kernels.py",
    "planner/test_memory.py",
    "training/test_train.py",
    "equivalence/test_backend_vs_backend.py",
    "training/test_commands.py",
    "training/test_training_graphs.py",
    "launcher/preflight/test_preflight_ranks.py",
    "launcher/failure/test_faults.py",
    "benchmarks/test_scaling.py",
    "planner/test_runs.py",
    "planner/test_arithmetic.py",
    "data/test_torchvision_compat.py",
    "report/test_report.py",
    "checkpoint_tools/verbs/test_export_program.py",
    "planner/test_command.py",
    "training/test_non_finite.py",
    "planner/test_calibrate.py",
    "data/test_workers.py",
    "commands/test_doctor.py",
    "checkpoint_tools/formats/test_deepspeed.py",
    "benchmarks/test_launches.py",
    "models/test_compiled.py",
    "ops/test_extension.py",
    "ops/detection/test_roi_align.py",
    "launcher/failure/test_failure.py",
    "engine/test_waits.py",
    "fuzz/test_wrong_input.py",
    "run/test_folder.py",
    "tasks/test_transfer.py",
    "csrc/test_nvcc.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`: whole matrices, fuzzing")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until pytest_collection_finish: 13,000 tests are made, and none of them is garbage
    if config.getoption("numprocesses", None):
        return  # the workers of pytest-xdist run the tests, and begin when this process is ready
    import torch

    from swin_moe.ops.attention.choice import Measuring

    torch.set_num_threads(1)
    Measuring.enabled = False  # the same path in every run of a test


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    items.sort(key=_turn)
    # Not item.keywords, which hold the names of folders as well: in a checkout called `gpu` all would be skipped.
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="needs --full"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Lets the collector of garbage pass by the tests and modules that are there by now.

    They stay until the end, as do those that each file of tests imports: a tenth of the suite's processor time went
    into looking through them again.
    """
    gc.freeze()
    gc.enable()


def _turn(item: pytest.Item) -> int:
    """Returns where a test's file stands in LONGEST, after all of them where it does not."""
    path = item.path.as_posix()
    return next((turn for turn, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Leaves each test the variables of this process: packages set some when they are imported.

    Where one of them is what torch reads, no rank of a later test would be a fork (tests/preloaded).
    """
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        if nextitem is not None and nextitem.path != item.path:
            gc.collect()
            gc.freeze()


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Leaves no log of a command that a test ran in this process to the next test."""
    yield
    logger = logging.getLogger("swin_moe")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True

"""Settings of the whole test suite: markers, one thread per process, the repository on the import path."""

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


# Files that take longest, first: with pytest -n 2 --dist loadfile, what begins last must not leave one process idle.
LONGEST = (
    "equivalence/test_engines.py",
    "training/test_commands.py",
    "training/test_training_graphs.py",
    "planner/test_memory.py",
    "training/test_compile.py",
    "training/test_train.py",
    "launcher/failure/test_faults.py",
    "equivalence/test_backend_vs_backend.py",
    "equivalence/test_expert_parallel.py",
    "planner/test_runs.py",
    "csrc/window/test_window_kernels.py",
    "launcher/preflight/test_preflight_ranks.py",
    "tasks/test_transfer.py",
    "tasks/test_layouts.py",
    "run/test_folder.py",
    "csrc/test_nvcc.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`: whole matrices, fuzzing")


def pytest_configure(config: pytest.Config) -> None:
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


def _turn(item: pytest.Item) -> int:
    """Returns where a test's file stands in LONGEST, after all of them where it does not."""
    path = item.path.as_posix()
    return next((turn for turn, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
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


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Leaves no log of a command that a test ran in this process to the next test."""
    yield
    logger = logging.getLogger("swin_moe")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True

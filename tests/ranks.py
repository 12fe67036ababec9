"""Runs a test function on several ranks under real MPI, with gloo ready. `python -m tests.ranks` is one such rank."""

import gc
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import mpi
from launcher.env import without_world
from tests import preloaded

ROOT = Path(__file__).resolve().parent.parent
# Worlds of tests that say the same of each: what two ranks show four do as well, in pairs, and more of it.
TWO_AND_FOUR = (pytest.param(2, marks=pytest.mark.full), 4)


def run_ranks(function: Callable[..., Any], world: int, tmp_path: Path, *args: Any, timeout: float = 120) -> list[Any]:
    """Returns what `function(*args)` returned on every rank, in rank order. One mpirun for the call.

    Args:
        function: Module-level function of a test module; runs with gloo initialized, also in a world of 1.
        args: Anything that pickles, the same on all ranks.
        timeout: Seconds until every process is killed and the call fails.

    Raises:
        AssertionError: With the traceback of the ranks that failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    (folder / "call.pkl").write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
    # Cores are left unbound: several tests share the machine, and each would crowd its first rank onto the same core.
    environ = preloaded.environment(without_world(os.environ) | {"OMP_NUM_THREADS": "1", mpi.NO_BIND: "1"})
    command = [sys.executable, "-m", "launcher", "--quiet", "-n", str(world), "--", "-m", "tests.ranks", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output = process.communicate(timeout=timeout)[0].decode(errors="replace")
        except BaseException as error:
            process.kill()  # the ranks die with the launcher
            output = process.communicate()[0].decode(errors="replace")
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise AssertionError(f"{function.__qualname__} on {world} ranks took over {timeout} s:\n{output}") from None
    print(output, end="")  # pytest shows it beside a failing test
    errors = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
    if process.returncode or errors:
        text = "\n".join(errors) or output[-4000:]
        code = process.returncode
        raise AssertionError(f"{function.__qualname__} failed on {world} ranks (exit code {code}):\n{text}")
    return [pickle.loads((folder / f"result-{rank}.pkl").read_bytes()) for rank in range(world)]


def _gloo_threads() -> int:
    """Returns how many threads of this process run collectives. One that asks for the interpreter while that is being
    taken down ends the process with "terminate called without an active exception"."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo_runloop" in name for name in names)


def _held_for_good() -> bool:
    """Returns whether others hold process groups: DeepSpeed, torch's optimizer of ZeRO-1, or what torch keeps of
    compiled programs and of layouts of DTensor, as which FSDP2 holds its shards."""
    from torch._dynamo.utils import counters
    from torch.distributed.tensor.debug import (
        _get_fast_path_sharding_prop_cache_stats,
        _get_python_sharding_prop_cache_info,
    )

    layouts = _get_python_sharding_prop_cache_info().misses + _get_fast_path_sharding_prop_cache_stats()[1]
    holders = {"deepspeed", "torch.distributed.optim"} & sys.modules.keys()
    return bool(holders or counters["frames"] or layouts)


def _run_here(folder: Path) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    try:
        module, name, args = pickle.loads((folder / "call.pkl").read_bytes())
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        distributed.init_process_group("gloo")
        result = function(*args)
        (folder / f"result-{rank}.pkl").write_bytes(pickle.dumps(result))
        distributed.barrier()  # a rank that is done must not tear down the group others still use
        distributed.destroy_process_group()
        del result, function
        gc.collect()
        left = 0 if _held_for_good() else _gloo_threads()
        assert not left, f"{left} threads of gloo are left: something still holds a process group"
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(f"[rank {rank}] {traceback.format_exc()}")
        raise


if __name__ == "__main__":
    _run_here(Path(sys.argv[1]))

"""The tools under real MPI: the bytes of one process, and one sentence where something is wrong."""

import os
import subprocess
import sys

import pytest

from checkpoint_tools.ranks import join_ranks
from launcher import mpi
from launcher.env import without_world
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import verify
from tests.checkpoint.samples import directory_bytes
from tests.checkpoint_tools.samples import save
from tests.checkpoint_tools.sources.test_stream import BIG
from tests.ranks import ROOT, TWO_AND_FOUR

PROGRAM = """
import sys
from checkpoint_tools.__main__ import main
from launcher import mpi
def run():
    run, work = sys.argv[1:]
    codes = [
        main(["convert", run, work + "/out", "--to", "native", "--max-memory", "64M"]),
        main(["verify", work + "/out"]),
        main(["diff", run, work + "/out", "--json"]),
        main(["average", run, run, work + "/mean"]),
        main(["reshard", run, work + "/resharded", "--world", "4", "--file-size", "1M"]),
        main(["convert", work + "/damaged", work + "/never", "--to", "native"]),
    ]
    assert codes == [0, 0, 0, 0, 0, 2] and "torch" not in sys.modules, codes
mpi.call(run)
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [("", None), ("1", None), ("2", "parallel only under MPI"), ("two", "environment variable WORLD_SIZE must be a")],
)
def test_what_the_environment_says_of_the_world(text, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", text)
    if said is None:
        assert join_ranks().size == 1
        return
    with pytest.raises(ValueError, match=said):
        join_ranks()


@pytest.mark.mpi
@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_ranks_write_the_bytes_of_one_process(tmp_path, world):
    source, work = save(tmp_path / "run", state=BIG, file_size=1 << 22), tmp_path / "work"
    damaged = save(work / "damaged", state=BIG)
    stored = Index.read(damaged).tensors["b"].chunks[0]
    with open(damaged / stored.file, "r+b") as file:
        file.seek(stored.end - 1)
        file.write(b"\x00")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "launcher", "-n", str(world), "--", str(program), str(source), str(work)]
    environ = without_world(os.environ) | {mpi.NO_BIND: "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = directory_bytes(save(tmp_path / "again", state=BIG, file_size=1 << 30))
    assert directory_bytes(work / "out") == expected
    for name in ("out", "mean", "resharded"):
        verify(work / name)
    assert sorted(p.name for p in work.iterdir()) == ["damaged", "mean", "out", "resharded"]
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "tensor b: bytes" in errors[0] and "rank " in errors[0], done.stderr
    assert f"{work / 'out'}: native, 3 tensors" in done.stdout and done.stdout.count("all match their digests") == 1

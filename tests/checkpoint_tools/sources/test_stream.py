"""The streaming engine: canonical bytes from any number of ranks, each byte read once, bounded memory, continued."""

import os
import subprocess
import sys

import numpy as np
import pytest

from checkpoint_tools.files.publish import Lock, hidden
from checkpoint_tools.formats import open_source
from checkpoint_tools.sources import stream
from checkpoint_tools.sources.base import Options
from checkpoint_tools.sources.journal import Journal
from swin_moe.checkpoint.digest import BLOCK_BYTES
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import verify
from swin_moe.checkpoint.sealed_json import read_sealed
from tests.checkpoint.samples import FILE_SIZE, directory_bytes, read_state, run_threads, same, sample_state
from tests.checkpoint_tools.samples import convert, save
from tests.ranks import ROOT

BIG = {
    "a.experts.fc1_weight": np.arange(2 * 1536 << 10, dtype="i4").reshape(2, 3 << 8, 1 << 11),
    "b": np.arange(9 << 20, dtype="u1").reshape(9, 1 << 20),
    "c": np.float32(3).reshape(()),
}


@pytest.mark.parametrize("file_size", [1, 1000, FILE_SIZE, 1 << 30])
def test_what_is_written_equals_a_save_with_that_file_size(tmp_path, file_size):
    expected = directory_bytes(save(tmp_path / "direct", file_size=file_size))
    result = convert(save(tmp_path / "source"), tmp_path / "out", file_size=file_size)
    assert directory_bytes(result) == expected
    verify(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["direct", "out", "source"]


@pytest.fixture
def reads(monkeypatch):
    """The byte counts of all reads of data so far."""
    asked, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, *a: (asked.append(real(fd, *a)), asked[-1])[1])
    return asked


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_number_of_ranks_writes_the_same_and_reads_no_byte_twice(tmp_path, reads, ranks):
    source = save(tmp_path / "source", state=BIG, file_size=1 << 22)
    expected = directory_bytes(source)
    reads.clear()
    run_threads(ranks, lambda comm: convert(source, tmp_path / "out", comm=comm, file_size=1 << 22))
    assert directory_bytes(tmp_path / "out") == expected
    headers = [file.header for file in Index.read(source).files.values()]
    data = sum(array.nbytes for array in BIG.values())
    # Ranks that share a file check its header each.
    assert data + sum(headers) <= sum(reads) <= data + sum(headers) + (ranks - 1) * max(headers)


@pytest.mark.parametrize(("file_size", "files"), [(1 << 22, 4), (1 << 30, 1)])
def test_files_are_read_once_from_front_to_back(tmp_path, monkeypatch, file_size, files):
    source = save(tmp_path / "source", state=BIG, file_size=file_size)  # inside a file c comes before b
    places, real = [], os.preadv

    def noting(fd, buffers, offset):
        places.append((os.readlink(f"/proc/self/fd/{fd}"), offset))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", noting)
    convert(source, tmp_path / "out")  # another file size: chunks of one file go to several and the other way round
    assert len({file for file, _ in places}) == files and places == sorted(places)


def test_units_cover_every_byte_once_in_whole_blocks(tmp_path):
    options = Options(max_memory=64 << 20)
    with open_source(save(tmp_path, state=BIG), options) as source:
        job = stream.plan_job(source, options)
    assert options.box_bytes == BLOCK_BYTES and len(job.units) == 2 * 2 + 3 + 1
    for unit in job.units:
        boxes = list(stream.unit_boxes(job.plan, unit))
        assert [begin for _, begin, _ in boxes] == [0, *(end for *_, end in boxes[:-1])]
        assert boxes[-1][2] == unit.num_bytes <= BLOCK_BYTES and unit.begin % BLOCK_BYTES == 0
    assert sum(unit.num_bytes for unit in job.units) == sum(array.nbytes for array in BIG.values())


def fail_write(monkeypatch, number, error):
    """Lets the `number`-th write of data into a shard fail."""
    real, seen = stream.ShardWriter.write_bytes, []

    def write(self, file, offset, data):
        seen.append(file)
        if len(seen) == number:
            raise error
        real(self, file, offset, data)

    monkeypatch.setattr(stream.ShardWriter, "write_bytes", write)


def interrupt(tmp_path, monkeypatch, error, **options):
    source = save(tmp_path / "source", state=BIG)
    with monkeypatch.context() as patch:
        fail_write(patch, 4, error)
        with pytest.raises(CheckpointError) as caught:
            convert(source, tmp_path / "out", max_memory=64 << 20, **options)
    return source, str(caught.value)


def test_a_full_disk_keeps_what_is_done_and_the_same_command_continues(tmp_path, monkeypatch, reads):
    full = OSError(28, "No space left on device", "shard-00000.safetensors")
    source, message = interrupt(tmp_path, monkeypatch, full)
    assert message == (
        "shard-00000.safetensors: No space left on device (what is done is kept, the same command continues)"
    )
    assert not (tmp_path / "out").exists() and len(Journal(tmp_path / "out").read()) == 3
    reads.clear()
    said = []
    convert(source, tmp_path / "out", report=said.append)  # more memory, hence larger units: the blocks are the same
    assert said == [f"{tmp_path / 'out'}: continues an interrupted run"]
    assert directory_bytes(tmp_path / "out") == directory_bytes(convert(source, tmp_path / "again"))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["again", "out", "source"]


def test_blocks_that_changed_since_are_copied_again(tmp_path, monkeypatch):
    source, _ = interrupt(tmp_path, monkeypatch, OSError(28, "full"))
    file = hidden(tmp_path / "out", "tmp") / "shard-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = b"?" * (len(data) - len(data) // 2)
    data[5000] ^= 1
    file.write_bytes(data)
    log = next(Journal(tmp_path / "out").directory.glob("*.log"))
    log.write_bytes(b"0123456789abcdef [1]\n\xff" + log.read_bytes()[:-3])  # and a torn journal
    verify(convert(source, tmp_path / "out", max_memory=64 << 20))
    assert directory_bytes(tmp_path / "out") == directory_bytes(convert(source, tmp_path / "again"))


def test_another_source_or_other_options_do_not_continue(tmp_path, monkeypatch):
    source, _ = interrupt(tmp_path, monkeypatch, OSError(28, "full"))
    said = []
    verify(convert(source, tmp_path / "out", file_size=9999, report=said.append))
    assert said == [] and Index.read(tmp_path / "out").file_size == 9999


def test_a_failure_that_another_try_would_meet_again_leaves_nothing(tmp_path, monkeypatch):
    source, message = interrupt(tmp_path, monkeypatch, CheckpointError("tensor b: drifts"))
    assert message == "tensor b: drifts" and [p.name for p in tmp_path.iterdir()] == ["source"]


def test_ranks_that_see_different_sources_refuse(tmp_path):
    sources = [save(tmp_path / "a", 0), save(tmp_path / "b", 1)]
    results = run_threads(2, lambda comm: convert(sources[comm.rank], tmp_path / "out", comm=comm))
    assert all("the ranks see different checkpoints" in str(error) for error in results)
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_overwritten_and_two_runs_do_not_mix(tmp_path, monkeypatch):
    source, _ = interrupt(tmp_path, monkeypatch, OSError(28, "full"))
    with Lock(hidden(tmp_path / "out", "tmp")) as lock:
        lock.take()
        with pytest.raises(CheckpointError, match="another run is writing it"):
            convert(source, tmp_path / "out")
    before = directory_bytes(convert(source, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'out'}: exists already"):
        convert(save(tmp_path / "other", 5), tmp_path / "out")
    assert directory_bytes(tmp_path / "out") == before


def test_what_came_into_the_place_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    source, real = save(tmp_path / "source"), stream.read_unit

    def read(*arguments):
        save(tmp_path / "out", 3)
        monkeypatch.setattr(stream, "read_unit", real)
        return real(*arguments)

    monkeypatch.setattr(stream, "read_unit", read)
    with pytest.raises(CheckpointError, match="out: Directory not empty|out.tmp: Directory not empty"):
        convert(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["0000000001"]
    verify(tmp_path / "out" / "0000000001")


def test_too_small_a_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    source = save(tmp_path / "source")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("checkpoint_tools.files.publish.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: \d+ bytes do not fit, 10 bytes are free"):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_provenance_tells_the_chain(tmp_path):
    first = convert(save(tmp_path / "source"), tmp_path / "a")
    chain = read_sealed(convert(first, tmp_path / "b") / "provenance.json")["parent"]
    assert chain["path"] == str(first) and chain["provenance"]["parent"]["provenance"] == {"time": "then"}
    assert same(read_state(tmp_path / "b"), sample_state())


MEASURE = """
import resource, sys
from pathlib import Path
from checkpoint_tools.__main__ import main
import checkpoint_tools.verbs.convert, checkpoint_tools.formats.native
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
assert main(["convert", sys.argv[1], sys.argv[2], "--to", "native", "--max-memory", sys.argv[3]]) == 0
print(peak() - before, "torch" in sys.modules)
"""


@pytest.mark.parametrize("bound", [64, 256])
def test_resident_memory_stays_below_the_bound_and_torch_unloaded(tmp_path, bound):
    state = {"m.experts.fc1_weight": np.ones((2, 5 << 10, 1 << 12), "f4"), "w": np.ones((7 << 10, 1 << 12), "f2")}
    source = save(tmp_path, state=state)  # 216 MiB
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), f"{bound}M"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, torch_loaded = done.stdout.splitlines()[-1].split()
    assert int(grown) < bound << 20 and torch_loaded == "False"

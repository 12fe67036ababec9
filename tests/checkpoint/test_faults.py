"""What a machine does to checkpoints: kills, flipped bits, cut, missing, swapped files. Nothing is silent or lost."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from swin_moe.checkpoint.directory import find_latest
from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import load_newest_valid, read_arrays, verify
from swin_moe.checkpoint.pieces import place_text
from swin_moe.checkpoint.save import write_checkpoint
from tests.checkpoint.samples import (
    CONFIG,
    FILE_SIZE,
    STATE,
    empty_like,
    read_state,
    run_threads,
    same,
    sample_state,
    whole_pieces,
)
from tests.ranks import ROOT

COUNTS = [20, pytest.param(200, marks=pytest.mark.full)]


def save(root, step, **options):
    pieces = whole_pieces(sample_state(step))
    provenance = {"time": "now"}
    return write_checkpoint(
        root, step, pieces, state=STATE, config=CONFIG, file_size=FILE_SIZE, provenance=provenance, **options
    )


@pytest.mark.parametrize("how", ["save", "background"])
@pytest.mark.parametrize("count", COUNTS)
def test_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, count, how):
    command = [sys.executable, "-m", "tests.checkpoint.crash", str(tmp_path), str(count), "0", how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["torch"] is False
    assert sum(result["outcomes"].values()) == count
    assert {"1:old", "2:new", "3:old", "3:new"} >= set(result["outcomes"])
    assert len(result["outcomes"]) >= 3


@pytest.mark.parametrize("count", COUNTS)
def test_a_reshard_killed_at_any_moment_is_continued_to_the_same_bytes(tmp_path, count):
    command = [sys.executable, "-m", "tests.checkpoint.crash", str(tmp_path), str(count), "0", "reshard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["torch"] is False
    assert sum(result["outcomes"].values()) == count
    assert {"there", "continued"} <= set(result["outcomes"]) <= {"there", "continued", "anew"}


@pytest.mark.parametrize("count", COUNTS)
def test_flipped_bits_in_any_file_are_found_and_named(tmp_path, count):
    path = save(tmp_path, 1)
    index, draw = Index.read(path), random.Random(0)
    files = sorted(path.iterdir())
    assert {"index.json", "provenance.json", "shard-00000.safetensors"} <= {file.name for file in files}
    for _ in range(count):
        file = draw.choice(files)
        original = file.read_bytes()
        place = draw.randrange(len(original))
        data = bytearray(original)
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        with pytest.raises(CorruptionError) as caught:
            verify(path)
        assert str(file) in str(caught.value)
        for name, tensor in index.tensors.items():
            for stored in tensor.chunks:
                if stored.file == file.name and stored.begin <= place < stored.end:
                    assert place_text(name, stored.chunk) in str(caught.value)
        if file.name != "provenance.json":  # which a load does not use
            with pytest.raises(CorruptionError, match=str(file)):
                read_state(path)
        file.write_bytes(original)
    verify(path)


def test_a_flip_in_one_expert_names_it_and_leaves_the_others_readable(tmp_path):
    path = save(tmp_path, 1)
    name = "layers.0.mlp.experts.fc1_weight"
    stored = Index.read(path).tensors[name].chunks[2]
    data = bytearray((path / stored.file).read_bytes())
    data[stored.begin + 5] ^= 16
    (path / stored.file).write_bytes(data)
    with pytest.raises(CorruptionError, match=rf"{stored.file}: tensor {name}, expert 2: bytes {stored.begin} to"):
        read_state(path)
    pieces = [p for p in whole_pieces(sample_state(1)) if p.name == name]
    wanted = [type(p)(p.name, p.shape, p.dtype, stored.chunk, np.empty(stored.chunk.size, "f4")) for p in pieces]
    for expert in (0, 1, 3):
        chunk = type(stored.chunk)((expert, 0, 0), stored.chunk.size)
        read_arrays(Index.read(path), [type(p)(p.name, p.shape, p.dtype, chunk, p.tensor) for p in wanted])
        assert np.array_equal(wanted[0].tensor[0], sample_state(1)[name][expert])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def make_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, grow, make_directory, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["index.json", "shard-00000.safetensors", "shard-00002.safetensors"])
def test_cut_and_missing_files_are_named_and_the_one_before_is_used(tmp_path, damage, name):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    damage(new / name)
    with pytest.raises(CorruptionError, match=str(new / name)):
        verify(new)
    reports = []
    assert find_latest(tmp_path, report=reports.append) == old
    assert len(reports) == 1 and str(new) in reports[0]


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00001.safetensors"])
def test_files_swapped_between_checkpoints_are_found(tmp_path, name):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(old / name, new / name)
    with pytest.raises(CorruptionError, match=str(new / name)):
        verify(new)


def test_swapped_shards_of_one_size_are_found_by_their_headers(tmp_path):
    pieces = whole_pieces({"a": np.ones(4), "b": np.ones(4)})
    path = write_checkpoint(tmp_path, 1, pieces, state={}, config={}, file_size=32)
    first, second = sorted(path.glob("*.safetensors"))
    data = first.read_bytes(), second.read_bytes()
    assert len(data[0]) == len(data[1])
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    with pytest.raises(CorruptionError, match="shard-00000.safetensors: its header"):
        verify(path)


def flip_first_chunk(path):
    stored = Index.read(path).tensors["counts"].chunks[0]
    data = bytearray((path / stored.file).read_bytes())
    data[stored.begin] ^= 1
    (path / stored.file).write_bytes(data)


def test_all_ranks_fall_back_together_if_one_finds_corruption(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    flip_first_chunk(new)
    reports = []

    def load_rank(comm):
        def loader(path):
            # Only rank 1 reads the damaged tensor.
            wanted = [p for p in empty_like(whole_pieces(sample_state(1))) if (p.name == "counts") == (comm.rank == 1)]
            read_arrays(Index.read(path), wanted)
            return {p.name: p.tensor for p in wanted}

        return load_newest_valid(tmp_path, loader, comm=comm, report=reports.append)

    results = run_threads(3, load_rank)
    assert [result[0] for result in results] == [old] * 3
    expected = sample_state(1)
    assert same(results[1][1], {"counts": expected.pop("counts")}) and same(results[0][1], expected)
    assert len(reports) == 1 and "rank 1" in reports[0] and "tensor counts" in reports[0] and str(new) in reports[0]


def test_nothing_valid_is_an_error_and_nothing_at_all_is_none(tmp_path):
    assert load_newest_valid(tmp_path / "none", read_state) is None
    flip_first_chunk(save(tmp_path, 1))
    with pytest.raises(CorruptionError, match="none of the 1 checkpoints is usable"):
        load_newest_valid(tmp_path, read_state, report=lambda text: None)


def test_the_byte_path_imports_no_torch():
    code = "import sys, swin_moe.checkpoint as c; c.Piece, c.save, c.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

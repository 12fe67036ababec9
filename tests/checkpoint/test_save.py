"""Saving: the same bytes from every layout, readable by strangers, atomic, and honest about failure."""

import errno
import json
import os
import re
import resource
import shutil
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from swin_moe.checkpoint.directory import (
    find_latest,
    is_complete,
    list_checkpoints,
    lock_directory,
    mark_best,
    read_best,
    read_complete,
)
from swin_moe.checkpoint.errors import CheckpointError, out_of_memory
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import verify
from swin_moe.checkpoint.pieces import Piece, array_to_raw
from swin_moe.checkpoint.plan import chunk_key
from swin_moe.checkpoint.save import write_checkpoint
from swin_moe.checkpoint.sealed_json import seal
from swin_moe.layout import Chunk
from tests.checkpoint.independent_reader import read_checkpoint
from tests.checkpoint.samples import (
    CONFIG,
    FILE_SIZE,
    STATE,
    directory_bytes,
    rank_pieces,
    read_state,
    run_threads,
    same,
    sample_state,
    whole_pieces,
)

SAVE = sys.modules["swin_moe.checkpoint.save"]


def save(root, step=1, seed=0, pieces=None, **options):
    pieces = whole_pieces(sample_state(seed)) if pieces is None else pieces
    options = {"state": STATE, "config": CONFIG, "file_size": FILE_SIZE} | options
    return write_checkpoint(root, step, pieces, **options)


def test_what_is_saved_is_read_back(tmp_path):
    path = save(tmp_path)
    assert path == tmp_path / "0000000001"
    assert same(read_state(path), sample_state())
    verify(path)


def test_an_independent_reader_needs_nothing_of_ours(tmp_path):
    big = {"big": np.random.default_rng(0).standard_normal((3, 1 << 19))}  # 12 MiB: several digest blocks
    path = save(tmp_path, pieces=whole_pieces(sample_state() | big))
    tensors, state, config = read_checkpoint(path)
    assert same(tensors, sample_state() | big) and (state, config) == (STATE, CONFIG)
    source = open(read_checkpoint.__code__.co_filename).read()
    assert "swin_moe" not in source and len(source.splitlines()) <= 60


def test_shards_are_safetensors_files(tmp_path):
    path, state = save(tmp_path), sample_state()
    files = sorted(path.glob("*.safetensors"))
    loaded = {}
    for file in files:
        loaded |= safetensors.numpy.load_file(file)
    assert len(files) > 2
    assert np.array_equal(loaded[chunk_key("head.bias", Chunk((0,), (7,)))], state["head.bias"])
    name = "layers.0.mlp.experts.fc1_weight"
    for expert in range(4):
        assert np.array_equal(loaded[f"{name}@{expert},0,0"], state[name][expert : expert + 1])
    assert loaded["step@"] == state["step"]


LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (4, 3), (8, 1), (5, 2)]


@pytest.mark.parametrize(("expert", "shard"), LAYOUTS)
def test_every_layout_writes_the_same_bytes(tmp_path, expert, shard):
    state = sample_state()
    expected = directory_bytes(save(tmp_path / "single"))

    def save_rank(comm):
        pieces = rank_pieces(state, comm.rank, expert=expert, shard=shard)
        return save(tmp_path / "many", pieces=pieces[:: -1 if comm.rank else 1], comm=comm)

    paths = run_threads(expert * shard, save_rank)
    assert paths == [tmp_path / "many" / "0000000001"] * (expert * shard)
    assert directory_bytes(paths[0]) == expected


def test_saving_twice_gives_the_same_bytes_and_provenance_is_apart(tmp_path):
    first = save(tmp_path / "a", provenance={"time": "now"})
    time.sleep(0.01)
    second = save(tmp_path / "b", provenance={"time": "later"})
    assert directory_bytes(first) == directory_bytes(second)
    assert (first / "provenance.json").read_bytes() != (second / "provenance.json").read_bytes()
    verify(first)


def test_sha256_is_an_option(tmp_path):
    path = save(tmp_path, algorithm="sha256")
    assert len(verify(path).tensors["counts"].chunks[0].digests[0]) == 64


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, seed=1)
    path = save(tmp_path, seed=2)
    assert same(read_state(path), sample_state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["0000000001"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, keep=2, best=0.5 + step if step in (1, 2) else None)
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == ["6", "5", "2"]
    assert read_best(tmp_path) == (2, 2.5)
    mark_best(tmp_path, 6, metric=9.0)
    save(tmp_path, 3, keep=1)  # an older step than the newest: what was just saved stays
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == ["6", "3"]


def test_retention_counts_no_broken_checkpoint_and_trusts_no_broken_record(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "0000000002" / "shard-00000.safetensors").unlink()
    reports = []
    save(tmp_path, 4, keep=2, report=reports.append)
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == ["4", "3", "2"]
    assert "0000000002" in reports[0]
    (tmp_path / "best.json").write_text("{}")
    save(tmp_path, 5, keep=1, report=reports.append)
    assert len(list_checkpoints(tmp_path)) == 4
    assert "best.json" in reports[-1]


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned(tmp_path):
    save(tmp_path, 1)
    for name in (".0000000002.tmp", ".0000000005.3f9c01aa.tmp", ".0000000003.trash", ".0000000001.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("half")
    assert find_latest(tmp_path).name == "0000000001"
    save(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000001", "0000000004"]


@pytest.mark.parametrize("steps", [(1, 1), (1, 2)], ids=["the same step", "another step"])
def test_two_writers_in_one_directory_both_publish_whole_checkpoints(tmp_path, steps):
    """A second job begins and ends a save while the first one has written half of its own."""
    first, second = sample_state(1), sample_state(2)
    done = []

    def interrupted(array):
        if not done:
            done.append(
                write_checkpoint(
                    tmp_path, steps[1], whole_pieces(second), state=STATE, config=CONFIG, file_size=FILE_SIZE, best=0.5
                )
            )
            assert same(read_state(done[0]), second)
        return array_to_raw(array)

    path = write_checkpoint(
        tmp_path, steps[0], whole_pieces(first), state=STATE, config=CONFIG, file_size=FILE_SIZE, to_raw=interrupted
    )
    assert verify(path) and same(read_state(path), first)
    assert steps[0] == steps[1] or (verify(done[0]) and same(read_state(done[0]), second))
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_what_another_writer_holds_stays_until_it_ends(tmp_path):
    staging = tmp_path / ".0000000007.3f9c01aa.tmp"
    staging.mkdir()
    held = lock_directory(staging)
    save(tmp_path, 1)
    assert staging.is_dir()
    os.close(held)
    save(tmp_path, 2)
    assert not staging.exists()


def test_a_directory_removed_during_a_save_is_named_as_that(tmp_path, monkeypatch):
    root = tmp_path / "run" / "checkpoints"

    def remove(array):
        shutil.rmtree(root, ignore_errors=True)
        return array_to_raw(array)

    pieces = whole_pieces(sample_state())
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write_checkpoint(root, 1, pieces, state=STATE, config=CONFIG, file_size=FILE_SIZE, to_raw=remove)
    create = SAVE.create_files
    monkeypatch.setattr(SAVE, "create_files", lambda *a: (create(*a), shutil.rmtree(root)))
    with pytest.raises(CheckpointError, match="tmp: was removed while the checkpoint was being written"):
        write_checkpoint(root, 1, pieces, state=STATE, config=CONFIG, file_size=FILE_SIZE)


def test_a_replaced_checkpoint_is_taken_back(tmp_path):
    os.rename(save(tmp_path, 1), tmp_path / ".0000000001.replaced")
    latest = find_latest(tmp_path)
    assert same(read_state(latest), sample_state())
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000001", "0000000002"]


BAD = {
    "shape of the array": (
        Piece("a", (4,), "F32", Chunk((0,), (4,)), np.zeros(3, "f4")),
        "tensor a: an array of shape",
    ),
    "box outside": (Piece("a", (4,), "F32", Chunk((2,), (4,)), np.zeros(4, "f4")), "tensor a: box at"),
    "dtype of the array": (Piece("a", (4,), "F64", Chunk((0,), (4,)), np.zeros(4, "f4")), "tensor a.*F64"),
    "name": (Piece("a\n", (4,), "F32", Chunk((0,), (4,)), np.zeros(4, "f4")), "printable"),
    "gap": (Piece("a", (4,), "F32", Chunk((0,), (3,)), np.zeros(3, "f4")), "tensor a: no rank holds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pieces_are_refused_before_anything_is_written(tmp_path, case):
    piece, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "root", pieces=[piece])
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "options",
    [{"step": -1}, {"step": 10**10}, {"file_size": 0}, {"keep": -1}, {"state": {"a": {1, 2}}}, {"config": [1]}],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, options):
    with pytest.raises(CheckpointError, match=next(iter(options))):
        save(tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    old = save(tmp_path, 1)
    big = whole_pieces({"big": np.ones(1 << 16)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"shard-00000.safetensors: File too large"):
            save(tmp_path, 2, pieces=big, file_size=1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["0000000001"]
    verify(old)


def test_too_little_free_space_is_found_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"bytes does not fit, 1000 bytes are free"):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


FAILURES = [("mkdir", errno.EROFS), ("pwrite", errno.ENOSPC), ("fsync", errno.EIO), ("rename", errno.EACCES)]


@pytest.mark.parametrize(("call", "code"), FAILURES)
def test_a_failing_system_call_names_its_path_and_leaves_the_old(tmp_path, monkeypatch, call, code):
    save(tmp_path, 1)
    real, last = getattr(os, call), []

    def failing(*args, **kwargs):
        last.append(args)
        if len(last) > (3 if call == "pwrite" else 0):
            raise OSError(code, os.strerror(code), None if call in ("pwrite", "fsync") else str(args[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*: {os.strerror(code)}"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["0000000001"]
    assert same(read_state(save(tmp_path, 2)), sample_state())


@pytest.mark.parametrize("place", ["file in the way", "not a directory"])
def test_an_impossible_target_is_named(tmp_path, place):
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    with pytest.raises(CheckpointError, match=str(blocker)):
        save(blocker if place == "file in the way" else blocker / "below")


def test_a_failure_on_one_rank_is_told_on_all_and_leaves_the_old(tmp_path):
    save(tmp_path, 1)
    state = sample_state()

    def save_rank(comm):
        def to_raw(array):
            if comm.rank == 2:
                raise MemoryError("no memory left")
            return array.view(f"u{array.dtype.itemsize}")

        pieces = rank_pieces(state, comm.rank, expert=4, shard=1)
        return save(tmp_path, 2, pieces=pieces, comm=comm, to_raw=to_raw)

    results = run_threads(4, save_rank)
    assert {str(error) for error in results} == {"rank 2: out of memory"}
    assert all(isinstance(error, CheckpointError) for error in results)
    assert {out_of_memory(error) for error in results} == {"rank 2: out of memory"}  # and so the exit code is its own
    assert [p.name for p in tmp_path.iterdir()] == ["0000000001"]


def test_ranks_at_different_steps_do_not_mix(tmp_path):
    results = run_threads(2, lambda comm: save(tmp_path, 1 + comm.rank, comm=comm))
    assert {str(error) for error in results} == {"the ranks must save one step together, got steps [1, 2]"}
    assert list(tmp_path.iterdir()) == []


def test_data_is_synced_before_the_index_and_the_index_before_the_rename(tmp_path, monkeypatch):
    events = []
    paths = {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "pwrite")}

    def opened(path, *args, **kwargs):
        fd = real["open"](path, *args, **kwargs)
        paths[fd] = os.path.basename(path)
        return fd

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", paths[fd])), real["fsync"](fd))[1])
    monkeypatch.setattr(os, "pwrite", lambda fd, *a: (events.append(("write", paths[fd])), real["pwrite"](fd, *a))[1])
    monkeypatch.setattr(
        os, "rename", lambda a, b: (events.append(("rename", os.path.basename(b))), real["rename"](a, b))
    )
    save(tmp_path)
    final = events.index(("rename", "0000000001"))
    dirty = set()
    for kind, name in events[:final]:
        if kind == "write" and "index" in name:
            assert not dirty
        dirty.add(name) if kind == "write" else dirty.discard(name)
    assert not dirty
    assert events[final - 1][0] == "sync" and re.fullmatch(r"\.0000000001\.[0-9a-f]{8}\.tmp", events[final - 1][1])
    assert events[final + 1] == ("sync", tmp_path.name)


def test_what_retention_asks_of_older_checkpoints_is_what_a_reader_finds(tmp_path):
    """A flipped byte anywhere in the index, and every loss of a file, by the quick look and by reading all of it."""
    path = write_checkpoint(tmp_path, 1, whole_pieces(sample_state()), state=STATE, config=CONFIG, file_size=FILE_SIZE)
    good = (path / "index.json").read_bytes()
    reports = []
    assert is_complete(path, reports.append) and read_complete(path, reports.append) and not reports
    for at in range(0, len(good), 37):
        (path / "index.json").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert not is_complete(path, reports.append) and read_complete(path, reports.append) is None
    content = {key: value for key, value in json.loads(good).items() if key != "xxh3_128"}
    for change, complete in (({"version": 2}, False), ({"files": 3}, False), ({"aaa": {"files": {}}}, True)):
        (path / "index.json").write_bytes(seal({**content, **change}))
        assert is_complete(path, reports.append) == complete
        assert (read_complete(path, reports.append) is not None) == complete
    (path / "index.json").write_bytes(good)
    for shard in path.glob("shard-*"):
        data = shard.read_bytes()
        for harm in (shard.unlink, lambda shard=shard: shard.write_bytes(b"")):
            harm()
            del reports[:]
            assert not is_complete(path, reports.append) and shard.name in reports[0]
            shard.write_bytes(data)
    assert is_complete(path, reports.append)


def test_saving_beside_older_checkpoints_parses_none_of_their_indexes(tmp_path, monkeypatch):
    def save(step):
        pieces = whole_pieces(sample_state(step))
        return write_checkpoint(tmp_path, step, pieces, state=STATE, config=CONFIG, file_size=FILE_SIZE, keep=2)

    for step in (1, 2):
        save(step)
    monkeypatch.setattr(Index, "read", lambda path: pytest.fail(f"{path} was parsed"))
    save(3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0000000003", "0000000002"]

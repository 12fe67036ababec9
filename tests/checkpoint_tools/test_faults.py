"""What happens to sources and targets of a conversion: nothing wrong is ever published, and errors say where."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import xxhash

from checkpoint_tools.__main__ import main
from swin_moe.checkpoint.index import Index
from swin_moe.checkpoint.load import verify
from swin_moe.checkpoint.pieces import place_text
from tests.checkpoint.samples import directory_bytes
from tests.checkpoint_tools.samples import convert, save
from tests.ranks import ROOT

COUNTS = [20, pytest.param(200, marks=pytest.mark.full)]


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Returns (exit code, output, errors) of a verb."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def refuse(capsys, tmp_path, source) -> str:
    """Returns the one sentence with which verify and convert refuse a source; nothing is written."""
    before = {p.name for p in tmp_path.iterdir()}
    sentences = set()
    for arguments in (("verify", source), ("convert", source, tmp_path / "out", "--to", "native")):
        code, _, error = run(capsys, *arguments)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
        sentences.add(error.partition(" (and ")[0].strip())
    assert {p.name for p in tmp_path.iterdir()} == before
    assert len({sentence.rpartition(":")[0] for sentence in sentences}) == 1 or len(sentences) == 1, sentences
    return sentences.pop()


@pytest.mark.parametrize("count", COUNTS)
def test_flipped_bits_in_any_file_of_the_source_are_named_and_nothing_is_written(tmp_path, capsys, count):
    source, draw = save(tmp_path / "run"), random.Random(1)
    index = Index.read(source)
    files = sorted(source.iterdir())
    for _ in range(count):
        file = draw.choice(files)
        original = file.read_bytes()
        place, data = draw.randrange(len(original)), bytearray(original)
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        sentence = refuse(capsys, tmp_path, source)
        assert str(file) in sentence
        for name, tensor in index.tensors.items():
            for stored in tensor.chunks:
                if stored.file == file.name and stored.begin <= place < stored.end:
                    assert place_text(name, stored.chunk) in sentence
        file.write_bytes(original)
    verify(convert(source, tmp_path / "out"))


def cut(path, other, draw):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def drop(path, other, draw):
    path.unlink()


def swap(path, other, draw):
    shutil.copy(other / path.name, path)


@pytest.mark.parametrize("damage", [cut, drop, swap])
@pytest.mark.parametrize("count", COUNTS)
def test_cut_missing_and_swapped_files_are_named_and_nothing_is_written(tmp_path, capsys, damage, count):
    source, other, draw = save(tmp_path / "run"), save(tmp_path / "other", 5), random.Random(2)
    files = [f for f in sorted(source.iterdir()) if f.name != "provenance.json"]
    if damage is swap:
        files = [f for f in files if f.name != "index.json"]  # which with its files would be the other checkpoint
    for _ in range(count):
        file = draw.choice(files)
        original = file.read_bytes()
        damage(file, other, draw)
        assert str(file) in refuse(capsys, tmp_path, source)
        file.write_bytes(original)
    assert directory_bytes(convert(source, tmp_path / "out")) == directory_bytes(source)


@pytest.mark.parametrize("count", COUNTS)
def test_a_file_size_limit_at_any_point_leaves_nothing_and_the_same_command_continues(tmp_path, count):
    """A file-size limit stands for a full disk: writes fail with EFBIG where they would fail with ENOSPC."""
    source, draw = save(tmp_path / "run", file_size=1 << 20), random.Random(3)
    limits = [draw.randrange(Index.read(source).files["shard-00000.safetensors"].size) for _ in range(count)]
    program = f"""
import os, resource, signal, sys
from checkpoint_tools.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for number, limit in enumerate({limits}):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    assert main(["convert", sys.argv[1], f"{{sys.argv[2]}}/out{{number}}", "--to", "native"]) == 2, limit
    assert not os.path.exists(f"{{sys.argv[2]}}/out{{number}}")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for number in range({count}):
    assert main(["convert", sys.argv[1], f"{{sys.argv[2]}}/out{{number}}", "--to", "native"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", program, source, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == count and all("File too large" in e and str(tmp_path) in e for e in errors)
    expected = directory_bytes(convert(source, tmp_path / "expected", file_size=1 << 30))
    for number in range(count):
        assert directory_bytes(tmp_path / f"out{number}") == expected
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small memory file system, which only root may do."""
    place = tmp_path / "mount"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place]).returncode:
        pytest.skip("mounting is not permitted")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_before_and_while_writing(tmp_path, capsys, mounted, monkeypatch):
    source = save(tmp_path / "run", state={"w": np.random.default_rng(0).standard_normal(1 << 14)})  # 128 KiB
    code, _, error = run(capsys, "convert", source, mounted / "out", "--to", "native")
    assert code == 2 and "bytes do not fit" in error and list(mounted.iterdir()) == []
    # Others fill it after the check.
    monkeypatch.setattr("checkpoint_tools.sources.stream.check_space", lambda *arguments: None)
    code, _, error = run(capsys, "convert", source, mounted / "out", "--to", "native")
    assert code == 2 and "No space left on device" in error and str(mounted) in error
    assert not (mounted / "out").exists()


def test_a_read_only_target_is_named(tmp_path, capsys, mounted):
    source = save(tmp_path / "run")
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    code, _, error = run(capsys, "convert", source, mounted / "out", "--to", "native")
    assert code == 2 and "Read-only file system" in error and str(mounted) in error


def test_a_read_only_source_is_enough(tmp_path, capsys, mounted):
    source = save(mounted)
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    assert run(capsys, "convert", source, tmp_path / "out", "--to", "native")[0] == 0
    assert run(capsys, "diff", source, tmp_path / "out")[0] == 0


def seal(content: dict) -> bytes:
    body = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()[:-1]
    return body + f',"xxh3_128":"{xxhash.xxh3_128_hexdigest(body)}"}}\n'.encode()


def hostile(change):
    def make(source):
        content = json.loads((source / "index.json").read_bytes())
        del content["xxh3_128"]
        change(content, content["tensors"]["counts"])
        (source / "index.json").write_bytes(seal(content))

    return make


HOSTILE = {
    "outside": (hostile(lambda c, t: c["files"].update({"../x": c["files"]["shard-00000.safetensors"]})), "plain name"),
    "absolute": (hostile(lambda c, t: c["files"].update({"/etc/passwd": {"bytes": 9}})), "plain name"),
    "overlap": (hostile(lambda c, t: t["chunks"].append(t["chunks"][0])), "overlap"),
    "overflow": (hostile(lambda c, t: t.update(shape=[1 << 40, 1 << 40])), "absurd"),
    "negative": (hostile(lambda c, t: t.update(shape=[-1, 5])), "whole numbers"),
    "huge": (hostile(lambda c, t: t["chunks"][0].update(bytes=[0, 1 << 60])), "are not in"),
    "deep": (lambda source: (source / "index.json").write_bytes(b'{"a":' + b"[" * 100000), "digest"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_indices_are_refused_and_nothing_is_written(tmp_path, capsys, case):
    make, reason = HOSTILE[case]
    source = save(tmp_path / "run")
    make(source)
    sentence = refuse(capsys, tmp_path, source)
    assert str(source / "index.json") in sentence and reason in sentence


def test_links_in_the_way_are_not_followed(tmp_path, capsys):
    source, elsewhere = save(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    for name in ("out", ".out.tmp", ".out.journal"):
        (tmp_path / name).symlink_to(elsewhere if name.startswith(".") else tmp_path / "nowhere")
        code, _, error = run(capsys, "convert", source, tmp_path / "out", "--to", "native")
        assert code == 2 and str(tmp_path / name) in error, name
        assert [p.name for p in elsewhere.iterdir()] == ["precious"] and not (tmp_path / "nowhere").exists()
        (tmp_path / name).unlink()

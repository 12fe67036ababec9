"""Files of torch.save, both ways: ours against torch's own reader and writer."""

import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from checkpoint_tools.files import record_file
from checkpoint_tools.files.record_file import split_spans
from checkpoint_tools.files.torch_file import TorchFile
from checkpoint_tools.files.torch_writer import constant, write_torch
from swin_moe.checkpoint.errors import CorruptionError
from swin_moe.checkpoint.manager import to_raw
from swin_moe.checkpoint.pieces import DTYPE_BYTES, RAW, dtype_name
from swin_moe.layout import Chunk
from tests.ranks import ROOT

_DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64 float8_e4m3fn float8_e5m2"
)
DTYPES = [getattr(torch, name) for name in _DTYPES.split()]


def read(file: TorchFile, record, box: Chunk | None = None) -> np.ndarray:
    box = box or Chunk.whole(record.shape)
    data = np.full(box.size, 77, RAW[DTYPE_BYTES[record.dtype]])
    file.read(record, box, data)
    return data


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6, 5)
    return {
        "plain": base,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:3, ::2],
        "shared": base[3],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        **{str(dtype): torch.randint(0, 100, (3, 2)).to(dtype) for dtype in DTYPES},
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_any_box_of_what_torch_saves(tmp_path, monkeypatch, zipped):
    saved, path = tensors(), tmp_path / "x.pt"
    if not zipped:  # the old form has no such storages
        saved = {name: t for name, t in saved.items() if t.dtype in DTYPES[:10]}
    torch.save({"model": saved, "n": [1, (2.5, None, True)]}, path, _use_new_zipfile_serialization=zipped)
    file, choose = TorchFile(path), random.Random(0)
    assert file.content["n"] == [1, (2.5, None, True)] and file.has_digests == zipped
    for limit in (16 << 20, 64, 8):  # bytes: whole tensors, some rows, single elements
        monkeypatch.setattr(record_file, "SPAN_BYTES", limit)
        for name, tensor in saved.items():
            record = file.content["model"][name]
            assert (record.shape, record.dtype) == (tuple(tensor.shape), dtype_name(tensor.dtype))
            file.verify(name, record)
            for _ in range(10):
                offset = tuple(choose.randint(0, n) for n in tensor.shape)
                size = tuple(choose.randint(0, n - o) for o, n in zip(offset, tensor.shape))
                part = tensor.detach()[tuple(slice(o, o + n) for o, n in zip(offset, size))].contiguous()
                np.testing.assert_array_equal(read(file, record, Chunk(offset, size)), to_raw(part), err_msg=name)


def test_torch_reads_what_is_written(tmp_path):
    saved, path = tensors(), tmp_path / "x.pth"
    content = {name: constant(to_raw(t.contiguous()), dtype_name(t.dtype)) for name, t in saved.items()}
    others = {"i": [0, -1, 2**31, -(2**31), 1 << 70], "f": 1e-300, "t": (True, False, ()), "text": "\xe4\n", 5: {}}
    write_torch(path, {"model": content, **others}, box_bytes=16)
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert {key: value for key, value in loaded.items() if key != "model"} == others
        for name, tensor in saved.items():
            assert loaded["model"][name].dtype == tensor.dtype
            np.testing.assert_array_equal(to_raw(loaded["model"][name]), to_raw(tensor.contiguous()), err_msg=name)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    again = tmp_path / "other" / path.name
    again.parent.mkdir()
    write_torch(again, {"model": content, **others}, box_bytes=1 << 20)
    assert again.read_bytes() == path.read_bytes()


def test_every_flipped_bit_of_the_data_is_found(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(100), "b": torch.randn(3)}, path)
    whole, file = path.read_bytes(), TorchFile(path)
    for name in ("a", "b"):
        record = file.content[name]
        begin = file.locate(record, Chunk.whole(record.shape))
        for bit in range(0, record.num_bytes * 8, 41):
            damaged = bytearray(whole)
            damaged[begin + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            other = TorchFile(path)
            with pytest.raises(CorruptionError, match=f"x.pt: tensor {name}: .*CRC-32"):
                other.verify(name, other.content[name])
            other.files.close()


def test_split_spans_cover_a_box_once_within_the_limit():
    for size, stride in (((3, 4, 5), (20, 5, 1)), ((3, 4, 5), (1, 3, 12)), ((7,), (9,)), ((), ()), ((2, 3), (0, 1))):
        for limit in (1, 2, 7, 1000):
            parts = split_spans(Chunk.whole(size), stride, limit)
            seen = np.zeros(size, int)
            for part in parts:
                seen[(*part.within(Chunk.whole(size)), ...)] += 1
                assert part.numel == 1 or sum((n - 1) * s for n, s in zip(part.size, stride)) + 1 <= limit
            assert (seen == 1).all()


def test_no_tool_imports_torch_to_read_or_write_foreign_files(tmp_path):
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(8, 3, 2, 2)}}, tmp_path / "x.pth")
    program = (
        "import sys; from checkpoint_tools.__main__ import main; a, b = sys.argv[1:]\n"
        "assert main(['convert', a, b, '--to', 'fairscale']) == 0 and main(['inspect', b, '--from', 'official']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x.pth"), str(tmp_path / "y.pth")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

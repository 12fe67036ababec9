"""Files made to do harm: refused by name, nothing executed, nothing written."""

import collections
import functools
import io
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoint_tools.__main__ import main
from checkpoint_tools.files.pickle_reader import plain, read_pickle
from checkpoint_tools.files.safetensors_file import SafetensorsFile
from checkpoint_tools.files.torch_file import TorchFile
from checkpoint_tools.formats import open_source, write_checkpoint
from checkpoint_tools.sources.base import Options
from swin_moe.checkpoint.errors import CheckpointError
from tests.models.reference import GOLDEN


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


def archive(path: Path, data: bytes, records: dict[str, bytes] | None = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in (records or {}).items():
            file.writestr(name, content)
    return path


def tensor_pickle(shape=(2,), stride=(1,), offset=0, numel=2, key="0", kind="FloatStorage") -> bytes:
    """Returns a pickle of one tensor, by opcodes."""
    out = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n" + kind.encode() + b"\n"
    values = [pickle.dumps(v, 2)[2:-1] for v in (key, "cpu", numel, offset, shape, stride)]
    out += values[0] + values[1] + values[2] + b"tQ" + values[3] + values[4] + values[5]
    return out + b"\x89ccollections\nOrderedDict\n)RtR."


MARK = "executed"
CODE = {
    "posix.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Calls(eval, f"open({mark!r}, 'w')"),
    "builtins.exec": lambda mark: {"model": {"w": Calls(exec, f"open({mark!r}, 'w')")}},
    "functools.partial": lambda mark: Calls(functools.partial(touch, mark)),
    "builtins.getattr": lambda mark: Calls(getattr, "text", "upper"),
    f"{__name__}.touch": lambda mark: [Calls(touch, mark)],
    "torch.serialization.load": lambda mark: Calls(torch.load, mark),
    "collections.Counter": lambda mark: collections.Counter("aab"),
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_calls_code_is_refused_by_name(tmp_path, name, zipped, capsys):
    mark, path = tmp_path / MARK, tmp_path / "bad.pth"
    hostile = {"model": {"w": torch.zeros(2)}, "config": CODE[name](str(mark))}
    torch.save(hostile, path, _use_new_zipfile_serialization=zipped)
    before = sorted(tmp_path.iterdir())
    for verb in (["inspect", str(path)], ["convert", str(path), str(tmp_path / "out"), "--to", "native"]):
        assert main([*verb, "--from", "official"]) == 2
        error = capsys.readouterr().err
        assert f"bad.pth: its pickle asks for the global {name}, which is refused" in error, error
    assert sorted(tmp_path.iterdir()) == before and not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}(X\x01\0\0\0acbuiltins\ndict\nq\x00h\x00}b.",  # sets attributes of what is admitted
        b"\x80\x02cyacs.config\nCfgNode\n}X\x0b\0\0\0__reduce_ex_cbuiltins\nset\nsb.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",  # too few arguments
        b"\x80\x02ctorch\nfloat32\n)R.",  # calls a name of a dtype
        b"\x80\x02}(]K\x01u.",  # a key that cannot be one
        b"\x80\x02(K\x01K\x02",  # no end
        b"\x80\x02h\x05.",  # nothing remembered there
        b"\x80\x02(ibuiltins\neval\n.",  # an opcode of old that calls
        b"\x80\x02Pname\n.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"garbage",
        b"",
        b"\x80\x02]" + b"(" * 10 + b"t" * 9 + b".",
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"}" + b"u.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\0\0\0O8K\x00K\x01\x87RU\x08aaaaaaaa\x86R.",
    ],
)
def test_a_broken_pickle_is_one_sentence(tmp_path, data):
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        TorchFile(archive(tmp_path / "bad.pth", data))


def test_options_that_refer_to_each_other_stay_small(tmp_path):
    bomb = []
    for _ in range(60):
        bomb = [bomb, bomb]
    value = read_pickle(pickle.dumps(bomb), "x")
    with pytest.raises(CheckpointError, match="too many"):
        plain(value, "x")
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    with pytest.raises(CheckpointError, match="too deeply"):
        plain(read_pickle(deep, "x"), "x")
    endless = read_pickle(b"\x80\x02]q\x00h\x00a.", "x")
    with pytest.raises(CheckpointError, match="too deeply"):
        plain(endless, "x")


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x", "archive/../../x", "archive\\..\\x"])
def test_a_record_that_leaves_its_directory_is_refused(tmp_path, name):
    path = archive(tmp_path / "bad.pth", pickle.dumps({}, 2), {name: b"x"})
    with pytest.raises(CheckpointError, match="leaves its directory"):
        TorchFile(path)


def test_zip_bombs_and_overlaps_are_refused(tmp_path):
    packed = archive(tmp_path / "a.pth", b"0" * 1_000_000, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        TorchFile(packed)
    data = bytearray(archive(tmp_path / "b.pth", tensor_pickle(), {"archive/data/0": b"12345678"}).read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    for field, value in ((42, 0), (42, 1 << 30), (20, 1 << 31), (24, 1 << 31)):
        changed = data.copy()
        changed[entry + field : entry + field + 4] = struct.pack("<I", value)
        if field in (20, 24):  # both sizes
            changed[entry + 20 : entry + 28] = struct.pack("<II", value, value)
        (tmp_path / "c.pth").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"c\.pth"):
            TorchFile(tmp_path / "c.pth")
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr("archive/data.pkl", pickle.dumps({1: 2}, 2))
    (tmp_path / "d.pth").write_bytes(twice.getvalue())
    with pytest.raises(CheckpointError, match="twice"):
        TorchFile(tmp_path / "d.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (3,)},
        {"shape": (1 << 40, 1 << 40), "stride": (0, 0)},
        {"shape": (1 << 62,)},
        {"shape": (-1,)},
        {"stride": (-1,)},
        {"stride": (1 << 61,)},
        {"offset": 1},
        {"offset": -1},
        {"numel": 3},
        {"numel": 1 << 63},
        {"key": "1"},
        {"key": "../0"},
        {"kind": "DoubleStorage"},
        {"kind": "Tensor"},
        {"shape": (1 << 40,), "stride": (0,)},
        {"shape": (1,) * 17, "stride": (1,) * 17},
        {"shape": (2.0,)},
        {"shape": (True,)},
        {"stride": ()},
    ],
    ids=str,
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, change):
    good = archive(tmp_path / "good.pth", tensor_pickle(), {"archive/data/0": b"12345678"})
    assert TorchFile(good).content.shape == (2,)
    bad = archive(tmp_path / "bad.pth", tensor_pickle(**change), {"archive/data/0": b"12345678"})
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        TorchFile(bad)


def test_truncated_files_are_one_sentence(tmp_path):
    path = tmp_path / "x.pth"
    for zipped in (True, False):
        torch.save({"model": {"w": torch.randn(50), "v": torch.randn(3)}}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for length in range(0, len(whole), 37):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=r"x\.pth"):
                TorchFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 8]}}',
    ],
)
def test_a_broken_safetensors_header_is_one_sentence(tmp_path, header):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"12345678")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        SafetensorsFile(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        SafetensorsFile(path)


CONV = "patch_embed.proj.weight"
BLOCK = "layers.0.blocks.0"
HOSTILE_MODELS = {
    "one dim": {CONV: torch.zeros(3)},
    "no channels": {CONV: torch.zeros(2, 3, 2, 2), f"{BLOCK}.mlp.fc1.weight": torch.zeros(4, 0)},
    "a scalar": {CONV: torch.zeros(2, 3, 2, 2), f"{BLOCK}.mlp.fc1.weight": torch.tensor(1.0)},
    "a distant stage": {CONV: torch.zeros(2, 3, 2, 2), "layers.999999999.blocks.0.norm1.weight": torch.zeros(2)},
    "a distant block": {CONV: torch.zeros(2, 3, 2, 2), "layers.0.blocks.99999999.norm1.weight": torch.zeros(2)},
    "a distant mask": {CONV: torch.zeros(2, 3, 2, 2), "layers.99999999999.blocks.0.attn_mask": torch.zeros(1, 4, 4)},
    "endless experts": {
        f"{BLOCK}.mlp._moe_layer.gates.0.wg.weight": torch.zeros(1 << 40, 0),
        f"{BLOCK}.mlp._moe_layer.experts.batched_fc1_w": torch.zeros(0, 1, 0),
    },
    "no router": {f"{BLOCK}.mlp._moe_layer.experts.batched_fc1_w": torch.zeros(2, 4, 3)},
    "other names": {CONV: torch.zeros(2, 3, 2, 2), "classifier.weight": torch.zeros(2)},
    "numbers": {CONV: 3},
}
HOSTILE_REST = {
    "groups of numbers": {"optimizer": {"state": {}, "param_groups": [1, 2]}},
    "state of lists": {"optimizer": {"state": {0: [1]}, "param_groups": [{"params": [0]}]}},
    "names as numbers": {"optimizer": {"state": {}, "param_groups": [{"params": [[0]]}]}},
    "a step of text": {"optimizer": {"state": {0: {"step": "x"}}, "param_groups": [{"params": [0]}]}},
    "tensors as options": {"config": {"MODEL": {"TYPE": torch.zeros(2)}}},
}


@pytest.mark.parametrize("name", [*HOSTILE_MODELS, *HOSTILE_REST])
def test_contents_that_no_training_wrote_are_one_sentence(tmp_path, name, capsys):
    model = HOSTILE_MODELS.get(name, {CONV: torch.zeros(2, 3, 2, 2)})
    torch.save({"model": model, **HOSTILE_REST.get(name, {})}, tmp_path / "bad.pth")
    code = main(["convert", str(tmp_path / "bad.pth"), str(tmp_path / "out"), "--to", "native", "--from", "official"])
    error = capsys.readouterr().err
    if name == "a distant mask":  # a buffer: passed over
        assert code == 0
    else:
        assert code == 2 and "bad.pth: " in error and len(error.splitlines()) == 1, error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"MODEL": {"TYPE": [1]}}, {"MODEL": 3}, {"DATA": {"IMG_SIZE": "x"}}, {"TRAIN": {"EPOCHS": -1}}], ids=str
)
def test_options_that_are_none_are_kept_as_they_are(tmp_path, options, capsys):
    torch.save({"model": {CONV: torch.zeros(2, 3, 2, 2)}, "config": options, "scaler": [1]}, tmp_path / "odd.pth")
    assert main(["convert", str(tmp_path / "odd.pth"), str(tmp_path / "out"), "--to", "native"]) == 0
    assert ("not as ours" in capsys.readouterr().out) == (options != {"MODEL": 3})


def test_a_setting_that_no_format_knows_is_refused(tmp_path, capsys):
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--to", "native", "--set", "image_size=3"]) == 2
    assert "--set image_size is unknown; did you mean img_size? allowed: counts, encoder" in capsys.readouterr().err


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.full)])
def test_changed_bytes_are_one_sentence_or_harmless(tmp_path, count):
    choose = random.Random(count)
    source, quiet = GOLDEN / "official_moe" / "ckpt_epoch_7.pth", Options(report=lambda text: None)
    with open_source(source, quiet) as opened:
        write_checkpoint(opened, tmp_path / "one.pth", quiet, "official")
        write_checkpoint(opened, tmp_path / "dcp", quiet, "dcp")
    targets = {"official": tmp_path / "one.pth", "dcp": tmp_path / "dcp" / ".metadata"}
    whole = {name: path.read_bytes() for name, path in targets.items()}
    ends = {"official": whole["official"].index(b"byteorder"), "dcp": len(whole["dcp"])}
    for _ in range(count):
        name = choose.choice(list(targets))
        data = bytearray(whole[name])
        for _ in range(choose.choice((1, 1, 2, 5))):
            data[choose.randrange(ends[name])] = choose.choice((choose.randrange(256), *b"(.]}RbuesaQq\x85\x86"))
        targets[name].write_bytes(data)
        try:
            open_source(targets[name].parent if name == "dcp" else targets[name], quiet, name).close()
        except CheckpointError as error:
            assert str(targets[name].parent) in str(error)
        targets[name].write_bytes(whole[name])

"""Official files that we write: names in their order, buffers, the same bytes from any number of ranks."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from checkpoint_tools.formats.official.layout import coordinates, in_module_order, official_buffers, position_index
from launcher import mpi
from launcher.env import without_world
from swin_moe import create_model
from swin_moe.checkpoint import CheckpointError
from swin_moe.checkpoint.index import Index
from tests.checkpoint_tools.formats.official_files import FILES, FORMS, NAMES, convert, identity, torch_load
from tests.ranks import ROOT

pytestmark = pytest.mark.usefixtures("yacs")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_patch4_window8_256"])
def test_dense_files_are_complete_and_in_the_official_order(tmp_path, name):
    model = create_model(name, embed_dim=12, num_heads=(1, 2, 4, 8)).eval()
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    native = convert(tmp_path / "ours.pth", tmp_path / "a", start="official")
    with pytest.raises(CheckpointError, match="--set img_size=N"):
        convert(native, tmp_path / "official.pth", "official")
    size, window = (224, 7) if "224" in name else (256, 8)
    extra = {"img_size": str(size), "window_size": str(window)}
    written = convert(native, tmp_path / "official.pth", "official", extra=extra)
    loaded = torch.load(written, weights_only=True)["model"]
    assert list(loaded) == list(NAMES[name])
    masks = {k: list(v.shape) for k, v in loaded.items() if k.endswith(("attn_mask", "_index", "_table"))}
    assert masks.keys() and all(NAMES[name][k] == v for k, v in masks.items() if not k.endswith("bias_table"))
    back = convert(written, tmp_path / "b")
    assert identity(back)["shard-00000.safetensors"] == identity(native)["shard-00000.safetensors"]
    assert Index.read(back).config["model"] == Index.read(native).config["model"] | {
        "img_size": [size, size],
        "window_size": window,
    }


def test_module_order_is_that_of_the_official_models():
    for keys in NAMES.values():
        assert in_module_order(sorted(keys, reverse=True)) == list(keys)


def test_buffers_equal_those_of_the_official_files():
    file = torch_load(FILES / f"{FORMS['epoch']}.rank0")["model"]
    network = {"name": "swin_moe", "img_size": [32, 32], "patch_size": [2, 2], "window_size": 4, "depths": [2, 2, 2]}
    buffers = official_buffers(network)
    assert buffers.keys() == {n for n in file if n.endswith(("attn_mask", "_index", "_coords_table"))}
    for name, value in buffers.items():
        np.testing.assert_array_equal(value, file[name].numpy(), err_msg=name)


@pytest.mark.parametrize(("window", "pretrained"), [(7, 0), (12, 0), (16, 12), (24, 0)])
def test_tables_against_their_formulas(window, pretrained):
    axis = torch.arange(-(window - 1), window, dtype=torch.float32) / ((pretrained or window) - 1) * 8
    wanted = torch.sign(axis) * torch.log2(axis.abs() + 1) / np.log2(8)
    table = torch.from_numpy(coordinates(window, pretrained))[0]
    torch.testing.assert_close(table[:, 0, 0], wanted, rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(table[0, :, 1], wanted, rtol=2e-7, atol=1e-7)
    index = position_index(window)
    for a in range(0, window * window, 5):
        for b in range(0, window * window, 7):
            down, right = a // window - b // window, a % window - b % window
            assert index[a, b] == (down + window - 1) * (2 * window - 1) + right + window - 1


PROGRAM = """
import sys
from checkpoint_tools.__main__ import main
from launcher import mpi
def run():
    source, work = sys.argv[1:]
    for to in ("official-moe", "official", "dcp", "native"):
        form = ["--set", "form=epoch"] if to == "official-moe" else []
        assert main(["convert", source, f"{work}/{to}", "--to", to, *form]) == 0
    assert "torch" not in sys.modules
mpi.call(run)
"""


@pytest.mark.mpi
def test_ranks_write_the_files_of_one_process(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environ = without_world(os.environ) | {mpi.NO_BIND: "1", "PYTHONPATH": str(ROOT)}
    written = []
    for world in (1, 3):
        work = tmp_path / f"by{world}"
        work.mkdir()
        program = ["-n", str(world), "--", str(tmp_path / "program.py"), str(FILES / FORMS["epoch"]), str(work)]
        command = [sys.executable, "-m", "launcher", *program]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        files = sorted(path for path in work.rglob("*") if path.is_file() and path.name != "provenance.json")
        written.append({str(path.relative_to(work)): path.read_bytes() for path in files})
    assert written[0] == written[1] and len(written[0]) == 8 + 1 + 2 + 2

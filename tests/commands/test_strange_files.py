"""Files that are none: pipes, devices, loops of links; where a file is wanted they are refused, never waited for."""

import os
import stat
from pathlib import Path

import pytest
from PIL import Image

from checkpoint_tools.formats import find_format
from launcher.preflight import report
from swin_moe import inspect_routing, predict
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.config import Config, DataConfig
from swin_moe.config.io import dump_config
from swin_moe.config.yaml_files import read_yaml
from swin_moe.data.datasets import build_dataset
from swin_moe.data.pixels import BrokenImage, read_image
from swin_moe.report import page


@pytest.fixture
def photos(tmp_path) -> Path:
    """Returns a data folder of one class."""
    for split in ("train", "val"):
        (tmp_path / split / "cat" / "more").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / "cat" / "more" / "a.png")
    return tmp_path


def folder(path):
    return build_dataset(DataConfig(name="folder", path=str(path)), "train", img_size=(8, 8))


def test_an_image_that_is_a_pipe_or_a_device_is_broken(photos):
    os.mkfifo(photos / "train" / "cat" / "pipe.png")
    (photos / "train" / "cat" / "zero.png").symlink_to("/dev/zero")
    dataset = folder(photos)
    assert len(dataset) == 3
    for index in range(2):
        with pytest.raises(BrokenImage, match="(pipe|zero).png: is no regular file"):
            dataset.sample(index)
    assert dataset.sample(2)[0].size == (4, 4)
    with pytest.raises(BrokenImage, match="is no regular file"):
        read_image("/dev/zero")


def test_a_link_back_to_a_folder_above_is_refused_and_others_are_followed(photos):
    link = photos / "train" / "cat" / "more" / "again"
    link.symlink_to(photos / "val" / "cat" / "more")
    assert len(folder(photos)) == 2
    link.unlink()
    link.symlink_to(photos / "train" / "cat")
    with pytest.raises(ValueError, match=f"data.path: the link {link} leads back to .*cat, a folder above it"):
        folder(photos)


def test_a_checkpoint_whose_links_lead_to_themselves_is_named(tmp_path):
    (tmp_path / "x.pth").symlink_to("x.pth")
    with pytest.raises(CheckpointError, match="x.pth: (cannot be opened: its symbolic links lead back|does not exist)"):
        find_format(tmp_path / "x.pth")


def test_a_config_without_an_end_or_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="/dev/zero is no config: it holds 1048576 characters or more"):
        read_yaml(Path("/dev/zero"))
    with pytest.raises(ValueError, match="/proc/self/mem cannot be read: Input/output error"):
        read_yaml(Path("/proc/self/mem"))


@pytest.mark.parametrize("main", [predict.main, inspect_routing.main])
def test_an_image_without_a_name_is_shown_as_one(main):
    with pytest.raises(ValueError, match="no such image file: ''$"):
        main(["digits_swin_moe", ""])


@pytest.mark.parametrize("write", ["config", "preflight", "report"])
def test_a_device_that_is_written_to_stays_one(write, tmp_path):
    """/dev/null as an output was replaced by a file, where root ran the command."""
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    if write == "config":
        dump_config(Config(), device)
    elif write == "preflight":
        report.write({"a": 1}, device)
    else:
        page.write("text", [], device, pictures=False)
    assert stat.S_ISCHR(device.lstat().st_mode) and not [path for path in tmp_path.iterdir() if path != device]

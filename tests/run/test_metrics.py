"""Records, also where tensorboard is missing, the disk is full or the folder is gone; and the peak of a device."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch

from launcher.env import without_world
from swin_moe.run import metrics
from swin_moe.run.metrics import MetricsWriter, peak_flops
from tests.ranks import ROOT


def test_without_tensorboard_one_warning_and_records(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError
    monkeypatch.setattr(logging.getLogger("swin_moe"), "propagate", True)
    writer = MetricsWriter(tmp_path, enabled=True, tensorboard=True, resume_step=0)
    writer.write(1, {"loss": 2.0}, histograms={"load": [1, 2]})
    writer.close()
    (record,) = [record for record in caplog.records if "tensorboard" in record.getMessage()]
    assert record.levelname == "WARNING" and "log.tensorboard=false" in record.getMessage()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0, "load": [1, 2]}


def test_the_peak_is_the_fastest_librarys(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(metrics, "serves", lambda x, weight: False)
    alone = peak_flops(cpu, "fp32")
    monkeypatch.setattr(metrics, "serves", lambda x, weight: True)
    monkeypatch.setattr(metrics, "packed_product", lambda x, weight: x)
    assert peak_flops(cpu, "fp32") > 100 * alone
    monkeypatch.setattr(metrics, "packed_product", lambda x, weight: time.sleep(0.05))
    assert peak_flops(cpu, "fp32") < 100 * alone


@pytest.fixture
def small_disk(tmp_path):
    """Returns a folder on a file system of 64 KiB; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("board", [False, True])
def test_a_full_disk_names_the_file(small_disk, board, capfd):
    writer = MetricsWriter(small_disk, enabled=True, tensorboard=board, resume_step=0)
    if not board:
        (small_disk / "rest").write_bytes(bytes(60_000))
    else:  # records fit into the page that metrics.jsonl has, TensorBoard's do not
        writer.write(1, {"loss": 1.0})
        writer.board.flush()
        fill = (small_disk / "rest").open("wb", buffering=0)
        with contextlib.suppress(OSError):
            while fill.write(bytes(4096)):
                pass
    with pytest.raises(OSError, match="No space left on device: '.*/(metrics.jsonl|tb)'") as error:
        for step in range(2, 2000):
            writer.write(step, {"loss": float(step)}, histograms={"load": [step] * 40} if board else None)
    assert error.value.errno == errno.ENOSPC and (board or error.value.filename.endswith("metrics.jsonl"))
    writer.close()
    assert "Traceback" not in capfd.readouterr().err


def test_tensorboard_on_a_full_disk_names_its_folder(tmp_path, monkeypatch, capfd):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = MetricsWriter(tmp_path, enabled=True, tensorboard=True, resume_step=0)
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="No space left on device: '.*/tb'"):
        for step in range(1000):
            writer.write(step, {"loss": 1.0})
            time.sleep(0.001)
    writer.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_log_on_a_full_disk_is_told_once(small_disk, capfd):
    metrics.start_logging(small_disk, 1)
    (small_disk / "rest").write_bytes(bytes(60_000))
    for number in range(2000):
        metrics.LOGGER.info("line %d", number)
    metrics.LOGGER.handlers.clear()
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "log-rank1.txt cannot be written any more: [Errno 28] No space" in err


def test_a_folder_that_is_gone_is_told(tmp_path):
    folder = tmp_path / "run"
    writer = MetricsWriter(folder, enabled=True, tensorboard=False, resume_step=0)
    writer.write(1, {"loss": 1.0})
    shutil.rmtree(folder)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="run was removed or moved while the run was writing to it"):
            writer.write(2, {"loss": 1.0})
        folder.mkdir(exist_ok=True)  # as a save makes it anew
    writer.close()


@pytest.mark.parametrize("by", ["nothing", "another"])
def test_records_that_are_gone_are_told(tmp_path, by):
    writer = MetricsWriter(tmp_path, enabled=True, tensorboard=False, resume_step=0)
    writer.write(1, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    if by == "another":
        (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="metrics.jsonl was removed or moved while the run was writing to it"):
        writer.write(2, {"loss": 1.0})
    writer.close()


def test_there_is_no_bar_on_the_terminal_that_open_mpi_gives_a_rank():
    code = (
        "import os; os.isatty(1) or os._exit(3)\n"
        "from swin_moe.run.metrics import Progress\n"
        "print(Progress(4, enabled=True).interactive)"
    )
    shown = []
    for more in ({}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        master, terminal = pty.openpty()
        subprocess.run(
            [sys.executable, "-c", code], stdout=terminal, cwd=ROOT, check=True, env=without_world(os.environ) | more
        )
        os.close(terminal)
        shown.append(os.read(master, 10_000).decode().strip())
        os.close(master)
    assert shown == ["True", "False"]


def test_a_log_line_takes_the_place_of_the_bar(tmp_path):
    code = (
        "from pathlib import Path; from swin_moe.run.metrics import *\n"
        "start_logging(None, 0); bar = Progress(4, enabled=True)\n"
        "LOGGER.info('before'); bar.show(1, 'one'); LOGGER.info('said'); LOGGER.info('more'); bar.show(2, 'two')\n"
        "bar.clear(); LOGGER.info('end')\n"
    )
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stdout=terminal, cwd=ROOT, check=True)
    os.close(terminal)
    shown = os.read(master, 10_000).decode().replace("\r\n", "\n")
    os.close(master)
    # What stands on a line when all is over: text after the last "erase this line".
    lines = [line.rpartition("\r\x1b[K")[2] for line in shown.split("\n")]
    assert lines == ["before", "said", "more", "end", ""] and "1/4 | one" in shown and "2/4 | two" in shown


def test_records_that_are_none_do_not_stop_a_run_that_goes_on(tmp_path):
    good = '{"step": 3}'
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\x98\n[1]\n7\n"x"\n{"step": null}\n' + good.encode() + b"\n\0\0\0")
    MetricsWriter(tmp_path, enabled=True, tensorboard=False, resume_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == f"{good}\n"

"""Records, also where tensorboard is missing, the disk is full or the folder is gone; and the peak of a device."""

import json
import logging
import sys
import time

import torch

from swin_moe import metrics
from swin_moe.metrics import MetricsWriter, peak_flops


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

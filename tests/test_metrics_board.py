"""Training goes on where tensorboard is not installed."""

import json
import logging
import sys

from swin_moe.metrics import MetricsWriter


def test_without_tensorboard_one_warning_and_records(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError
    monkeypatch.setattr(logging.getLogger("swin_moe"), "propagate", True)
    writer = MetricsWriter(tmp_path, enabled=True, tensorboard=True, resume_step=0)
    writer.write(1, {"loss": 2.0}, histograms={"load": [1, 2]})
    writer.close()
    (record,) = [record for record in caplog.records if "tensorboard" in record.getMessage()]
    assert record.levelname == "WARNING" and "log.tensorboard=false" in record.getMessage()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0, "load": [1, 2]}

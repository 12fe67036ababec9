"""The examples are what the launcher writes, and the container files copy what is there and pin what is tested."""

import os
import re
from pathlib import Path

import pytest

from launcher import script

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
SHAPE = ["--nodes", "2", "--ranks-per-node", "4", "--cores-per-rank", "8", "--gpus-per-node", "4", "--time", "8:00:00"]
SHAPE += ["--name", "swin", "--python", "/opt/venv/bin/python"]
PROGRAM = ["--", "-m", "swin_moe.train", "swin_moe_base_patch4_window12_192_32expert_32gpu_22k", "run.name=first"]
WRITTEN = {
    "swin.slurm": ["--scheduler", "slurm", "--queue", "gpu"],
    "swin.yaml": ["--scheduler", "k8s", "--image", "registry/swin-moe:cuda"],
}


@pytest.mark.parametrize("name", WRITTEN)
def test_they_are_what_the_launcher_writes(name, capsys, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/data/run")
    assert script.main([*WRITTEN[name], *SHAPE, *PROGRAM]) == 0
    text = capsys.readouterr().out
    if os.environ.get("LAUNCHER_WRITE_GOLDEN"):
        (EXAMPLES / name).write_text(text)
    assert text == (EXAMPLES / name).read_text()


@pytest.mark.parametrize("name", ["cpu.Dockerfile", "cuda.Dockerfile"])
def test_containers_copy_what_is_there_and_pin_what_is_tested(name):
    text = (EXAMPLES / name).read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    needed = {"setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "csrc", "configs"}
    assert {"swin_moe", "launcher", "checkpoint_tools", *needed} <= set(copied)
    assert [word for word in copied if not (ROOT / word).exists()] == []
    assert re.search(r"grep .\^torch==. requirements.txt", text) and "--no-build-isolation" in text
    assert "SWIN_MOE_REQUIRE_EXT=1" in text  # an image without its kernels is an error

"""Files and folders of every kind, right ones and wrong ones, to be named where others are wanted."""

import dataclasses
import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from swin_moe import create_model
from swin_moe.checkpoint import CheckpointManager, Piece

SMALL = """run: {{name: small, output: {output}}}
data: {{name: synthetic, synthetic_samples: 8, global_batch: 4, auto_augment: "", erase_prob: 0.0}}
model:
  name: swin_moe
  img_size: 16
  patch_size: 4
  num_classes: 3
  embed_dim: 8
  depths: [1, 1]
  num_heads: [1, 2]
  window_size: 2
  pretrained_window_sizes: [0, 0]
  moe: {{blocks: [[0], [0]], num_experts: 2}}
optim: {{epochs: 1, warmup_epochs: 0}}
log: {{tensorboard: false}}
"""


def make_files(root: Path) -> dict[str, str]:
    """Returns name -> path below `root`: configs, checkpoints, images, archives, damaged ones, and what is missing."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "small.yaml").write_text(SMALL.format(output=root / "runs"))
    _write_weights(root)
    _write_images(root)
    _write_configs(root)
    _write_folders(root)
    found = {str(path.relative_to(root)): str(path) for path in sorted(root.rglob("*"))}
    for path in ("missing", "missing.yaml", "missing.pth", "small.yaml/x", "folder/é☃", "n" * 300, "nul\0"):
        found[path] = str(root / path)
    return found | {"": "", "/": "/", "device": "/dev/null", "unreadable": "/proc/self/mem"}


def _write_weights(root: Path) -> None:
    small = {"img_size": 16, "window_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 3}
    model = create_model("swin_moe", **small, num_experts=2, moe_blocks=((0,), (0,)), pretrained_window_sizes=(0, 0))
    pieces = [Piece.of(name, p.detach()) for name, p in model.named_parameters()]
    CheckpointManager(root / "native").save(1, pieces, state={}, config={"model": dataclasses.asdict(model.config)})
    torch.save({"model": model.state_dict()}, root / "model.pth")
    torch.save({"model": model.state_dict()}, root / "legacy.pth", _use_new_zipfile_serialization=False)
    contents = {
        "list": [1, 2],
        "number": 3,
        "none": None,
        "text": "x",
        "nested": {"model": {"a": {"b": 1}}},
        "scalars": {"model": {"patch_embed.proj.weight": torch.ones(())}},
        "nothing": {"model": {}},
        "swapped": {"model": {k: v.mT if v.ndim == 2 else v for k, v in model.state_dict().items()}},
        "whole": {"model": {k: v.int() for k, v in model.state_dict().items()}},
        "keys": {1: torch.ones(2)},
    }
    for name, content in contents.items():
        torch.save(content, root / f"{name}.pth")
    data = (root / "model.pth").read_bytes()
    (root / "cut.pth").write_bytes(data[: len(data) // 2])
    (root / "empty.pth").write_bytes(b"")
    (root / "noise.pth").write_bytes(np.random.default_rng(0).bytes(4096))
    (root / "text.safetensors").write_text("no tensors\n")
    (root / "gz.pth").write_bytes(gzip.compress(data))


def _write_images(root: Path) -> None:
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(root / "image.png")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(root / "pixel.png")
    (root / "cut.png").write_bytes((root / "image.png").read_bytes()[:40])
    (root / "text.png").write_text("no image\n")
    (root / "nothing.png").touch()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(root / "deep.png")
    Image.new("CMYK", (20, 20), (10, 20, 30, 40)).save(root / "cmyk.jpg")
    Image.new("RGB", (3000, 1)).save(root / "wide ☃.png")
    Image.new("RGB", (20, 20)).save(
        root / "moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")]
    )


def _write_configs(root: Path) -> None:
    for name, written in {"bom": b"\xef\xbb\xbf", "two bytes": b"\xff\xfe", "crlf": b""}.items():
        config = (root / "small.yaml").read_bytes()
        (root / f"{name}.yaml").write_bytes(written + (config.replace(b"\n", b"\r\n") if name == "crlf" else config))
    (root / "image.yaml").write_bytes((root / "image.png").read_bytes())
    for name, text in {
        "empty": "",
        "list": "[1, 2]",
        "word": "word",
        "twice": "model: {}\nmodel: {}",
        "open": "a: [",
        "itself": "base: itself.yaml",
        "null": "model: null",
        "tag": "run: !!python/object:os.x {}",
        "anchor": "run: &a {name: *a}",
        "merge": "optim: &a {lr: 0.1}\nlog: {<<: *a}",
        "octal": "run: {name: 010}",
        "sexagesimal": "run: {seed: 1:30}",
        "documents": "run: {}\n---\nrun: {}",
        "tabs": "run:\n\tname: x",
        "binary": "run: !!binary aGk=",
        "official": "MODEL: {TYPE: 3}",
        "official2": "DATA: [1]\nMODEL: {SWIN: {DEPTHS: x}}",
        "numbers": "1: 2",
        "base": "base: nowhere",
        "based": "base: 3",
        "folded": "? [a]\n: b",
    }.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "latin.yaml").write_bytes("run: {name: é}".encode("latin-1"))


def _write_folders(root: Path) -> None:
    for name in ("pipe.png", "pipe.pth", "pipe.yaml"):
        os.mkfifo(root / name)
    for name in ("loop.png", "loop.pth", "loop.yaml", "loop"):
        (root / name).symlink_to(name)
    (root / "folder").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (root / "photos" / split / "a").mkdir(parents=True, exist_ok=True)
        (root / "photos" / split / "a" / "x.png").write_bytes((root / "image.png").read_bytes())
        (root / "broken" / split / "a").mkdir(parents=True, exist_ok=True)
        (root / "broken" / split / "a" / "x.png").write_text("no image")
        (root / "zips").mkdir(exist_ok=True)
        (root / "zips" / f"{split}.zip").write_bytes(b"PK\3\4 cut")
    with zipfile.ZipFile(root / "archive.zip", "w") as file:
        file.writestr("x.txt", "x")
    (root / "names.txt").write_text("a\nb\nc\n")
    (root / "hosts").write_text("a b c d\n:4\n")

"""Random wrong input to every verb: exit code 2 and one sentence, or a result; never a traceback, never numpy's words.

`make test` runs few commands, `make test-full` many; a seed gives the same ones everywhere.
"""

import dataclasses
import random
import re

import numpy as np
import pytest
import torch

from checkpoint_tools.__main__ import VERBS, main
from swin_moe import create_model
from swin_moe.checkpoint.manager import CheckpointManager
from swin_moe.checkpoint.pieces import Piece

RAW = re.compile(
    r"\w+Error:|Errno|object has no|object is not|not subscriptable|cannot reshape|broadcast|out of range"
    r"|unexpected keyword|NoneType|invalid literal|must be real|unhashable|^error: '\w+'$"
)
FORMATS = "native safetensors official official-moe deepspeed dcp fairscale dense simmim tutel timm hf nope".split()
VALUES = ["0", "-1", "1", "3", "7", "8", "16", "x", "", "1.5", "nan", "9" * 20, "[1]", "[[1],[1,2]]", "/dev/null"]
OPTIONS = (
    "--from --from-a --from-b --to --world --expert --expert-shard --set --file-size --digest --on-drift --max-memory "
    "--duplicate --split --merge --prune --load --experts --blocks --top-k --router-std --reinit --optimizer --seed "
    "--weights --batch"
).split()
FLAGS = ["--dry-run", "--json", "--no-verify", "--ema", "--last", "--normalize-gate", "--no-check"]
SETTINGS = (
    "img_size=0 img_size=x img_size=30 window_size=9 window_size=-1 step=x form=final form=q encoder=keep counts=no "
    "nope=1 img_size = img_size=99999999"
).split()


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    """Returns paths of many kinds: checkpoints of several formats, parts of them, broken ones, other files, nothing."""
    root = tmp_path_factory.mktemp("input")
    small = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3}
    for family, options in (("swin", {}), ("swin_moe", {"num_experts": 4, "moe_blocks": ((-1,), (1,))})):
        model = create_model(family, **small, **options)
        pieces = [Piece.of(name, p.detach()) for name, p in model.named_parameters()]
        config = {"model": dataclasses.asdict(model.config)}
        native = CheckpointManager(root / family).save(1, pieces, state={}, config=config)
        torch.save({"model": model.state_dict()}, root / f"{family}.pth")
        for to in ("official-moe", "dcp", "fairscale", "hf", "timm", "official"):
            main(["convert", str(native), str(root / f"{family}-{to}"), "--to", to])
    data = (root / "swin.pth").read_bytes()
    (root / "cut.pth").write_bytes(data[: len(data) // 2])
    (root / "flipped.pth").write_bytes(data[:900] + bytes([data[900] ^ 255]) + data[901:])
    (root / "empty").write_bytes(b"")
    (root / "noise").write_bytes(np.random.default_rng(0).bytes(4096))
    (root / "text.yaml").write_text("model: {name: swin}\n")
    (root / "directory").mkdir()
    for name, content in {
        "list": [1, 2],
        "number": 3,
        "nested": {"model": {"a": {"b": torch.ones(2)}}},
        "none": None,
        "odd": {"model": {"patch_embed.proj.weight": torch.ones(2, 2)}},
        "flat": {"patch_embed.proj.weight": torch.ones(())},
        "swapped": {k: v.T if v.ndim == 2 else v for k, v in model.state_dict().items()},
        "optimizer": {"model": {"head.bias": torch.ones(3)}, "optimizer": {"state": 3}},
    }.items():
        torch.save(content, root / f"{name}.pth")
    found = [str(path) for path in sorted(root.rglob("*"))]
    return [*found, str(root / "swin_moe-official-moe"), str(root / "missing"), str(root / "empty" / "x"), "", "/", "."]


def command(draw: random.Random, paths: list[str], target: str) -> list[str]:
    """Returns a verb with paths and options that mostly make no sense."""
    verb = draw.choice(list(VERBS))
    count = 1 if verb in ("inspect", "verify") else draw.choice((1, 1, 1, 2))
    words = [verb, *(draw.choice(paths) for _ in range(count))]
    if verb not in ("inspect", "verify", "diff"):
        words.append(draw.choice([target, target, target, *paths[:3]]))
    needed = {"convert": "--to", "export": "--to", "reshard": "--world", "upcycle": "--experts"}.get(verb)
    needed = draw.choice(["--duplicate", "--split", "--merge", "--prune"]) if verb == "experts" else needed
    for option in ([needed] if needed else []) + draw.sample(OPTIONS, draw.choice((0, 0, 0, 1))):
        choices = {
            "--to": FORMATS + ["onnx", "torch-export"],
            "--from": FORMATS,
            "--from-a": FORMATS,
            "--from-b": FORMATS,
            "--set": SETTINGS,
            "--load": paths,
        }.get(option, VALUES)
        words += [option, draw.choice(choices)]
    return words + draw.sample(FLAGS, draw.choice((0, 0, 1)))


@pytest.mark.parametrize(("seed", "commands"), [(15, 40), pytest.param(16, 1000, marks=pytest.mark.full)])
def test_wrong_input_ends_with_one_sentence_or_works(seed, commands, paths, tmp_path, capsys):
    draw, counts = random.Random(seed), {}
    for number in range(commands):
        words = command(draw, paths, str(tmp_path / f"out{number}"))
        try:
            code = main(words)
        except SystemExit as stop:  # argparse
            code, parsed = stop.code, False
        else:
            parsed = True
        error = capsys.readouterr().err
        assert code in (0, 1, 2), words
        if code == 2 and parsed:
            assert error.startswith("error: ") and error.count("\n") == 1, (words, error)
            assert not RAW.search(error), (words, error)
            assert len(error) < 600, (words, error)
        assert not list(tmp_path.glob(".*")) or code == 2, words
        counts[code, parsed] = counts.get((code, parsed), 0) + 1
    assert counts[2, True] > commands // 4 and counts.get((0, True), 0) > 0, counts

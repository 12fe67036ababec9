"""How many steps an optimizer did: Adam counts them, SGD does not; never step 0 over trained weights without a word."""

import pytest
import torch

from checkpoint_tools.__main__ import main
from checkpoint_tools.formats.official.state import steps_of_schedule
from swin_moe import create_model
from swin_moe.checkpoint.errors import CheckpointError
from swin_moe.checkpoint.index import Index
from tests.checkpoint_tools.formats.official_files import convert

SIZES = {"img_size": "32", "window_size": "4"}


def official_file(path, *, name="sgd", schedule=None, epoch=1, epochs=10, **train):
    """Writes what the official loop saves after an epoch, of a real optimizer that did two steps; returns the path."""
    torch.manual_seed(0)
    model = create_model(
        "swin", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3
    )
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.ndim > 1 and "relative_position_bias_table" not in n]
    rest = [p for p in named.values() if not any(p is q for q in decayed)]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    kind = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    optimizer = kind(groups, lr=0.1, **({"momentum": 0.9, "nesterov": True} if name == "sgd" else {}))
    for _ in range(2):
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "max_accuracy": 1.0}
    if schedule is not None:
        content |= {"lr_scheduler": schedule, "config": {"TRAIN": {"EPOCHS": epochs, **train}}}
    torch.save(content, path)
    return path


COSINE = {"t_initial": 500, "warmup_t": 100}
STEPS = {
    "cosine": (COSINE, {"WARMUP_EPOCHS": 2}, 100),
    "without warm-up": ({"t_initial": 500, "warmup_t": 0}, {"WARMUP_EPOCHS": 0}, 100),
    "prefix": ({"t_initial": 400, "warmup_t": 100}, {"WARMUP_EPOCHS": 2, "LR_SCHEDULER": {"WARMUP_PREFIX": True}}, 100),
    "steps": ({"decay_t": 1500, "warmup_t": 100}, {"WARMUP_EPOCHS": 2, "LR_SCHEDULER": {"DECAY_EPOCHS": 30}}, 100),
    "fractions": ({"t_initial": 501, "warmup_t": 100}, {"WARMUP_EPOCHS": 2}, None),
    "contradiction": ({"t_initial": 500, "warmup_t": 200}, {"WARMUP_EPOCHS": 2}, None),
    "nothing": ({}, {}, None),
    "nonsense": ({"t_initial": "500", "warmup_t": True}, {"WARMUP_EPOCHS": 2.5, "LR_SCHEDULER": 3}, None),
}


@pytest.mark.parametrize("case", STEPS)
def test_an_sgd_file_has_the_step_of_its_epoch_and_schedule(case, tmp_path, capsys):
    """Ten epochs of 50 steps, of which two are done."""
    schedule, train, steps = STEPS[case]
    path = official_file(tmp_path / "x.pth", schedule=schedule, **train)
    content = {"epoch": 1, "lr_scheduler": schedule, "config": {"TRAIN": {"EPOCHS": 10, **train}}}
    assert steps_of_schedule(content) == steps
    if steps is not None:
        native = convert(path, tmp_path / "native", extra=SIZES)
        assert Index.read(native).step == steps
        assert any(name.startswith("optim.momentum_buffer/") for name in Index.read(native).tensors)
        return
    for verb in ("inspect", "verify"):
        assert main([verb, str(path)]) == 0
    assert main(["convert", str(path), str(tmp_path / "native"), "--to", "native"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {path}: its optimizer counts no steps, and nothing else tells them; convert it with --set step=N\n"
    )
    assert not (tmp_path / "native").exists()
    native = convert(path, tmp_path / "native", extra=SIZES | {"step": "77"})
    assert Index.read(native).step == 77
    with pytest.raises(CheckpointError, match="--set step must be a number of optimizer steps, got 'x'"):
        convert(path, tmp_path / "n2", extra={"step": "x"})


def test_adam_counts_for_itself(tmp_path):
    path = official_file(tmp_path / "x.pth", name="adamw", schedule=COSINE)
    assert Index.read(convert(path, tmp_path / "native", extra=SIZES)).step == 2


@pytest.mark.parametrize("to", ["official", "fairscale", "dcp"])
def test_other_formats_keep_the_step_of_sgd(to, tmp_path):
    """None of the three has a place of its own for it."""
    source = convert(official_file(tmp_path / "x.pth"), tmp_path / "native", extra=SIZES | {"step": "77"})
    back = convert(convert(source, tmp_path / "other", to), tmp_path / "back", extra=SIZES)
    assert Index.read(back).step == 77


def test_a_step_that_nobody_knows_is_not_written_as_zero(tmp_path):
    path = official_file(tmp_path / "x.pth")
    for number, to in enumerate(("official", "fairscale", "dcp")):
        other = convert(path, tmp_path / str(number), to, extra=SIZES)
        with pytest.raises(CheckpointError, match="counts no steps"):
            convert(other, tmp_path / f"{number}n", extra=SIZES)

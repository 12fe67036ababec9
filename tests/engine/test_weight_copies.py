"""Weights that the network holds in half precision: runs of the real trainer equal those in which autocast casts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import swin_moe.engine.replicated as replicated
from swin_moe.config.io import load_config
from swin_moe.engine.weight_copies import LinkedCopies, WeightCopies, copies_of
from swin_moe.models import build_model
from swin_moe.ops import extension
from swin_moe.train import Trainer
from tests.engine.test_common import config, engine, on_meta, train
from tests.ranks import run_ranks
from tests.tasks import cases

COMMON = ("optim.ema=0.5", "data.images_per_class=4", "log.eval_every=1", "model.drop_path_rate=0.2")
BF16, SHARED = "engine.precision=bf16", ("model.moe.shared_experts=1",)
# name -> (config, options). 20 pixels are 10 x 10 tokens, which windows of 4 do not divide: fused attention then uses
# the bias of queries, keys and values twice.
RUNS = {
    "padded": ("digits_dense", (BF16, "model.img_size=20", "data.micro_batch=10", *cases.MOE, *SHARED)),
    "accumulated": ("digits_dense", (BF16, "data.micro_batch=5")),
    "fp16, moe": ("digits_dense", ("engine.precision=fp16", "data.micro_batch=10", *cases.MOE, *SHARED)),
    "recomputed": ("digits_dense", (BF16, "parallel.recompute=block", "data.micro_batch=10")),
    "swinv2": ("digits_dense", (BF16, "model.name=swinv2")),
    "frozen": ("digits_dense", (BF16, "optim.freeze=backbone")),
    "simmim": ("digits_simmim", (BF16, "data.micro_batch=5")),
    "moby": ("digits_moby", (BF16, *cases.MOBY, "parallel.recompute=block")),
    "skipped": ("digits_dense", ("engine.precision=fp16", "data.micro_batch=10")),
}
EXPERTS = (*cases.MOE, *SHARED)
# On several ranks; of 4 some have no image in the last step of an epoch.
LINKED = {
    "accumulated": RUNS["accumulated"],
    "moe, zero 1": ("digits_dense", (BF16, *EXPERTS, "parallel.zero=1")),
    "moe": ("digits_dense", (BF16, *EXPERTS, "model.img_size=20", "data.micro_batch=5")),
    "experts on every rank": ("digits_dense", (BF16, *EXPERTS, "parallel.expert=1")),
    "fp16, recomputed": ("digits_dense", ("engine.precision=fp16", *EXPERTS, "parallel.recompute=block")),
    "fairscale 1": ("digits_dense", (BF16, *EXPERTS, "engine.name=fairscale", "parallel.zero=1")),
    "fairscale 2": ("digits_dense", (BF16, "engine.name=fairscale", "parallel.zero=2", "data.micro_batch=5")),
    "frozen": RUNS["frozen"],
    "moby": ("digits_moby", (BF16, *cases.MOBY, "parallel.recompute=block", "parallel.zero=1")),
    "skipped": ("digits_dense", ("engine.precision=fp16", "data.micro_batch=5")),
}


def finish(trainer: Trainer) -> dict:
    """Returns what a run that came to its end wrote and saved, without times."""
    rows = [
        {k: v for k, v in row.items() if k.startswith(("train/", "eval/"))} for row in cases.records(trainer.session)
    ]
    return {"rows": rows, "saved": {p.name: torch.as_tensor(p.tensor).clone() for p in trainer.engine.pieces()}}


def run(directory: Path, name: str, *, copied: bool, source: str = "") -> tuple[dict, str]:
    """Returns (outcome, the first of its checkpoints) of a run with or without copies."""
    setup, options = (RUNS if dist.get_world_size() == 1 else LINKED)[name]
    extra = (*COMMON, *options, "checkpoint.every=1", *((f"checkpoint.load={source}",) if source else ()))
    kept = replicated.copies_of
    if not copied:
        replicated.copies_of = lambda *_, **__: None
    try:
        trainer = Trainer(cases.open_tiny(directory, setup, *extra))
    finally:
        replicated.copies_of = kept
    made: Any = trainer.engine
    kind = type(None) if not copied else WeightCopies if dist.get_world_size() == 1 else LinkedCopies
    assert type(made.parts.copies) is kind
    if name == "skipped":
        trainer.engine.loss_scale.value = 2.0**40  # the first steps overflow, and are repeated to name what did
    trainer.resume()
    trainer.run()
    return finish(trainer), str(sorted((directory / "run" / "checkpoints").glob("0*"))[0])


def compare(root: str, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns per run what differs: of the whole runs, and of the ends of runs continued the other way."""
    different = {}
    for name in names:
        folder = Path(root) / name.replace(" ", "-")
        cast, source = run(folder / "cast", name, copied=False)
        runs = {"copied": run(folder / "copied", name, copied=True)[0]}
        if name in ("accumulated", "moby"):
            runs["continued"] = run(folder / "continued", name, copied=True, source=source)[0]
        different[name] = [
            f"{kind}: {key}"
            for kind, found in runs.items()
            for key, value in cast["saved"].items()
            if not torch.equal(value, found["saved"][key])
        ]
        if runs["copied"]["rows"] != cast["rows"]:
            different[name].append("records")
        assert cast["rows"] or dist.get_rank(), "a run writes records"
    return different


QUICK = ("padded",)


@pytest.mark.mpi
@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(RUNS.keys() - QUICK), marks=pytest.mark.full)], ids=len)
def test_runs_are_the_same_to_the_bit(tmp_path, names):
    assert run_ranks(compare, 1, tmp_path, str(tmp_path), names, timeout=400) == [{name: [] for name in names}]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, ("moe, zero 1",)),
        pytest.param(2, tuple(LINKED.keys() - {"moe, zero 1"}), marks=pytest.mark.full),
        pytest.param(4, tuple(LINKED), marks=pytest.mark.full),
    ],
    ids=lambda value: value if isinstance(value, int) else len(value),
)
def test_several_ranks_are_the_same_to_the_bit(tmp_path, world, names):
    for result in run_ranks(compare, world, tmp_path, str(tmp_path), names, timeout=800):
        assert result == {name: [] for name in names}


def linked_network():
    model = build_model(load_config("digits_swin_moe", []).model)
    model.init_weights(0)
    return model, LinkedCopies(model, torch.bfloat16)


def forward(model):
    with torch.autocast("cpu", torch.bfloat16):
        logits, aux = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return logits.float().square().sum() + aux


def test_gradients_arrive_while_backward_runs():
    """As DDP reduces bucket after bucket: of a block before those of the block in front of it."""
    model, copies = linked_network()
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    with copies.used():
        forward(model).backward()
    blocks = [".".join(name.split(".")[:4]) for name in arrived if ".blocks." in name]
    found = [block for block, before in zip(blocks, ["", *blocks]) if block != before]
    assert found == [f"layers.{stage}.blocks.{b}" for stage in (1, 0) for b in reversed(range((2, 4)[stage]))]


def test_a_linked_network_is_itself_again():
    model, copies = linked_network()
    names, weight = list(dict(model.named_parameters())), model.layers[0].blocks[0].attn.proj.weight
    with copies.used():
        assert model.layers[0].blocks[0].attn.proj.weight is weight, "before its block begins"
        with torch.no_grad():
            forward(model)
        assert model.layers[0].blocks[0].attn.proj.weight.dtype == torch.bfloat16
        loss = forward(model)
        assert model.layers[0].blocks[0].attn.proj.weight.grad_fn is not None, "gradients after a look without them"
        assert list(dict(model.named_parameters())) == names
    assert model.layers[0].blocks[0].attn.proj.weight is weight
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_weight_written_in_place_is_cast_before_it_is_used():
    model, copies = linked_network()
    weight = model.layers[0].blocks[0].attn.proj.weight
    model.eval()
    with torch.no_grad():
        before = forward(model)
        weight.add_(1)
        copies.verify()
        weight.add_(1)
        plain = forward(model)
        with copies.used():
            assert torch.equal(forward(model), plain) and not torch.equal(plain, before)
        weight.data.add_(1)
    with pytest.raises(ValueError, match="attn.proj.weight was changed in the network"):
        copies.verify()


def test_which_weights_have_copies():
    one = engine(BF16)
    names = {name for name, p in one.local_model.named_parameters() if p.dtype == torch.bfloat16}
    assert names == set(one.parts.copies.masters)
    kinds = {name.split(".", 4)[-1] if "layers" in name else name for name in names}
    assert {"attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc2.bias"} <= kinds
    assert "mlp.fc1.bias" in kinds
    assert "patch_embed.proj.weight" in names
    assert not any(word in name for name in names for word in ("router", "experts", "norm", "qkv.bias", "relative"))
    assert {piece.dtype for piece in one.pieces()} == {"F32"}


def test_a_bias_that_a_kernel_adds_in_float32_has_no_copy(monkeypatch):
    on_the_cpu = set(WeightCopies(build_model(config().model), torch.bfloat16).copies)
    monkeypatch.setattr(extension, "kernels_take", lambda x, compiled: True)  # as on CUDA
    with_kernels = set(WeightCopies(build_model(config().model), torch.bfloat16).copies)
    left = on_the_cpu - with_kernels
    assert left and all(name.endswith("mlp.fc1.bias") for name in left) and with_kernels < on_the_cpu


@pytest.mark.parametrize(
    ("options", "world"),
    [
        ((), 1),
        (("engine.precision=fp64",), 1),
        ((), 2),
        ((BF16, "parallel.zero=2"), 2),
        ((BF16, "parallel.zero=3"), 2),
        ((BF16, "engine.name=deepspeed", "parallel.zero=1"), 2),
        ((BF16, "engine.offload=optimizer"), 1),
        ((BF16, "engine.offload=optimizer"), 2),
        ((BF16, "parallel.compile=block"), 2),
        ((BF16, "parallel.compile=block"), 1),
        ((BF16, "task.name=elsewhere:Task"), 1),
    ],
)
def test_autocast_casts_elsewhere(options, world):
    assert copies_of(on_meta(config()), config(*options), world_size=world) is None


@pytest.mark.parametrize("write", ["in place", "to .data"])
def test_a_weight_changed_in_the_network_is_not_lost_silently(write):
    one = engine(BF16)
    weight = one.local_model.layers[0].blocks[0].attn.proj.weight
    with torch.no_grad():
        (weight if write == "in place" else weight.data).add_(1)
    said = "attn.proj.weight was changed in the network.*Engine.change_weights"
    with pytest.raises(ValueError, match=said):
        one.pieces()
    if write == "in place":  # which is seen at the next update, before it would be lost
        with pytest.raises(ValueError, match=said):
            one.change_weights(lambda parts: None)


def test_weights_changed_through_the_engine_reach_the_network():
    one = engine(BF16, "optim.ema=0.5")
    name = next(iter(one.parts.copies.masters))
    one.change_weights(lambda parts: parts[name][0].fill_(3.0))
    assert one.local_model.get_parameter(name).eq(3).all() and one.parts[name].leaf.eq(3).all()
    with one.evaluation():
        average = one.ema.average[name]  # which holds the weights meanwhile
        assert average.eq(3).all() and not one.local_model.get_parameter(name).eq(3).all()
    assert one.local_model.get_parameter(name).eq(3).all()


def test_micro_batches_add_up_in_float32():
    model = build_model(load_config("digits_swin_moe", []).model)
    model.init_weights(0)
    copies = WeightCopies(model, torch.bfloat16)
    name, copy = next(iter(copies.copies.items()))
    for value in (1.0, 2.0**-9):  # the sum is no bfloat16
        copy.grad = torch.full_like(copy, value)
        copies.collect()
        assert copy.grad is None
    assert copies.masters[name].grad.eq(1 + 2.0**-9).all()


def test_steps_of_the_plain_engine_use_them():
    one = engine(BF16)
    before = {name: copy.detach().clone() for name, copy in one.parts.copies.copies.items()}
    with one.autocast():
        train(one, 1)
    changed = [name for name, copy in one.parts.copies.copies.items() if not torch.equal(copy, before[name])]
    assert changed
    for name, copy in one.parts.copies.copies.items():
        assert torch.equal(copy, one.parts[name].leaf.to(torch.bfloat16)), name

"""The same checks on a CUDA device: the network and its gradients equal the CPU's; a run trains, saves and resumes;
communication over NCCL (one rank) and over gloo (two ranks on one device) changes nothing."""

import json
import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch

import swin_moe
from swin_moe.engine.graphs import GraphedForward
from swin_moe.parallel.exchange.payload import PAYLOADS
from swin_moe.randomness import RandomContext, keep_mask, normal, uniform

pytestmark = pytest.mark.gpu

SMALL = dict(
    img_size=64, patch_size=2, num_classes=11, embed_dim=32, depths=[2, 2, 2], num_heads=[1, 2, 4], window_size=8
)
MODELS = {
    "swin": dict(),
    "swinv2": dict(),
    "swin_mlp": dict(),
    "swin_moe": dict(moe_blocks=[[-1], [1], [1]], num_experts=8, moe_drop=0.1),
}


@pytest.fixture(autouse=True)
def exact_matmuls():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("name", MODELS)
def test_network_and_gradients_equal_the_cpu(name):
    model = swin_moe.create_model(name, **SMALL, **MODELS[name]).train()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.zero_grad()
        x = images.to(device).requires_grad_()
        output = model(x, random=RandomContext(3, 5, torch.arange(4, device=device)))
        logits, aux = output if isinstance(output, tuple) else (output, 0)
        (logits.square().mean() + aux).backward()
        results.append([logits, x.grad] + [p.grad for p in model.parameters() if p.grad is not None])
    for cpu, cuda in zip(*results):
        assert (cpu - cuda.cpu()).norm() <= 1e-4 * cpu.norm() + 1e-7


@pytest.mark.parametrize("name", MODELS)
def test_a_replayed_forward_equals_the_eager_one(name):
    model = swin_moe.create_model(name, **SMALL, **MODELS[name]).eval().cuda()
    graphed = GraphedForward(model)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for seed in range(4):
            x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).cuda()
            found, expected = (out[0] if isinstance(out, tuple) else out for out in (graphed(x), model(x)))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        remainder = model(x[:1]), graphed(x[:1])
        torch.testing.assert_close(*(out[0] if isinstance(out, tuple) else out for out in remainder))


def test_draws_equal_the_cpu():
    rows = torch.arange(1000)
    for draw in (uniform, lambda *a: keep_mask(*a, drop=0.3)):
        assert torch.equal(draw(42, rows, 16), draw(42, rows.cuda(), 16).cpu())
    torch.testing.assert_close(normal(42, rows, 16), normal(42, rows.cuda(), 16).cpu())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_saves_and_resumes(tmp_path, precision):
    from swin_moe.train import main

    options = [
        f"run.output={tmp_path}",
        "engine.device=cuda",
        f"engine.precision={precision}",
        "data.name=synthetic",
        "data.synthetic_samples=256",
        "log.tensorboard=false",
        "optim.warmup_epochs=0",
    ]
    main(["digits_swin_moe", *options, "optim.epochs=1"])
    main(["digits_swin_moe", *options, "optim.epochs=2"])
    steps = sorted(path.name for path in (tmp_path / "digits_swin_moe" / "checkpoints").glob("0*"))
    assert steps[-1] == f"{2 * (256 // 64):010d}"


RECORDED = {
    "dense": ("model.moe.blocks=[]",),
    "accumulated": ("data.micro_batch=8", "model.drop_rate=0.1"),
    "padded": ("model.moe.backend=padded", "model.moe.dropout=0.1", "parallel.recompute=block"),
    "fp16": ("model.moe.backend=padded", "engine.precision=fp16", "data.micro_batch=8"),
}


@pytest.mark.parametrize("options", RECORDED.values(), ids=RECORDED)
def test_replayed_training_steps_equal_the_eager_ones(tmp_path, options):
    from swin_moe.train import main
    from tests.training.cases import TINY

    losses = []
    for graphs in ("false", "true"):
        own = [f"run.output={tmp_path}", f"run.name={graphs}", f"engine.cuda_graphs={graphs}", "engine.device=cuda"]
        main(["digits_swin_moe", *TINY, "engine.precision=bf16", "optim.epochs=0.25", *options, *own])
        rows = [json.loads(line) for line in (tmp_path / graphs / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert len(losses[0]) >= 8
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", ["native", "padded"])
def test_a_training_step_waits_once(tmp_path, monkeypatch, backend):
    from swin_moe.config.io import load_config
    from swin_moe.parallel.groups import single_process_groups
    from swin_moe.run.session import Session
    from swin_moe.train import Trainer
    from tests.training.cases import TINY

    options = [f"run.output={tmp_path}", "engine.precision=bf16", "log.every=100", f"model.moe.backend={backend}"]
    config = load_config("digits_swin_moe", [*TINY, *options])
    trainer = Trainer(Session(config, single_process_groups(), torch.device("cuda")))
    waits, take = [], trainer._train_step

    def step(batches):
        last = trainer.progress.step + 1 == trainer.schedule.total  # evaluates, records and saves
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("default" if last else "warn")
            try:
                result = take(batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append([str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)])
        return result

    monkeypatch.setattr(trainer, "_train_step", step)
    trainer.run()
    assert all(len(found) <= 1 for found in waits[1:-1]), waits  # the first one measures and caches


@pytest.mark.parametrize("name", ["bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_payloads_equal_the_cpu(name, dtype):
    codec = PAYLOADS[name]
    rows = torch.randn(100, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[3] = 0
    found = codec.decode(codec.encode(rows.cuda()), dtype).cpu()
    # The quotient by the scale may be rounded the other way on a device: one step of e4m3 in rare elements.
    expected = codec.decode(codec.encode(rows), dtype)
    assert ((found - expected).abs() <= 0.13 * rows.abs()).all() and (found != expected).float().mean() < 1e-3


ALONE = (
    "import torch, sys; from swin_moe.parallel.groups import ensure_distributed; {}from swin_moe.train import main; "
)
NCCL = "torch.cuda.set_device(0); ensure_distributed(torch.device('cuda', 0)); "
LAYOUTS = {  # name -> (ranks, what runs before, options)
    "one rank over NCCL": (1, NCCL, ["parallel.zero=0"]),
    "one rank over NCCL, ZeRO-3": (1, NCCL, ["parallel.zero=3"]),
    "two ranks, one device": (2, "", ["parallel.zero=0"]),
    "two ranks, one device, rows in chunks": (2, "", ["parallel.zero=0", "model.moe.overlap=2"]),
    "two ranks, one device, ZeRO-1": (2, "", ["parallel.zero=1"]),
    "two ranks, one device, ZeRO-3": (2, "", ["parallel.zero=3"]),
}


def train_records(directory, ranks: int, before: str, options: list[str]) -> list[dict]:
    """Returns the step records of a short run of `ranks` processes, started by hand: a GPU machine may have no MPI."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", ALONE.format(before) + "main(sys.argv[1:])", "digits_swin_moe", *options]
    command += [f"run.output={directory}", "engine.device=cuda", "data.name=synthetic", "data.synthetic_samples=256"]
    command += ["log.tensorboard=false", "optim.warmup_epochs=0", "optim.epochs=1", "log.every=1", "data.workers=0"]
    command += ["model.moe.capacity_factor=0", "engine.precision=fp32"]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
    started = [
        subprocess.Popen(command, env=os.environ | world | ({"RANK": str(rank)} if world else {}))
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(timeout=120) for process in started] == [0] * ranks
    finally:
        for process in started:
            process.kill()
    lines = (directory / "digits_swin_moe" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train_records(tmp_path_factory.mktemp("alone"), 1, "", [])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_as_one_process(tmp_path, alone, name):
    found = train_records(tmp_path, *LAYOUTS[name])
    assert len(found) == len(alone) == 4
    for ours, reference in zip(found, alone):
        for key in ("train/loss", "train/grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-4), (ours["step"], key)

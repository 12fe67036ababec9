"""The same checks on a CUDA device: the network and its gradients equal the CPU's; a run trains, saves and resumes."""

import pytest
import torch

import swin_moe
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

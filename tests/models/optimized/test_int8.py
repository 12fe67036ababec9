"""swin_moe.optimize in int8: what whole numbers written out give, near the network; threads, commands, refusals."""

import json
import re
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import swin_moe
from swin_moe import evaluate, predict, throughput, train
from swin_moe.models.attention import WindowAttention
from swin_moe.models.layers import Mlp, PatchMerging
from swin_moe.models.optimized import OptimizedSwin
from swin_moe.ops.packed_layers import refusal
from swin_moe.run.session import run_main
from tests.models.optimized.test_network import EXPERTS, OPTIONS, build, image, logits_of, relative
from tests.ops.test_packed_int8 import GROUP, slow_linear, whole, whole_weight

pytestmark = pytest.mark.skipif(bool(refusal()), reason=f"no packed layers here: {refusal()}")

# Relative error of logits against the network's own.
BOUND = 0.1


class SlowLinear(nn.Linear):
    """A linear layer by whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product, in float64."""
        return slow_linear(x.flatten(0, -2), self.weight, self.bias).view(*x.shape[:-1], -1)


class SlowGroups(nn.Linear):
    """The second layer of a feed-forward network, whose inputs are rounded in groups."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product, in float64."""
        columns, of_column = whole_weight(self.weight)
        y = 0
        for group, part in zip(x.split(GROUP, -1), columns.split(GROUP, 1)):
            rows, scale, least = whole(group)
            y = y + (rows @ part.t()) * scale + least * part.sum(1)
        return y * of_column + (0 if self.bias is None else self.bias)


def become(layer: nn.Module, kind: type[nn.Module]) -> None:
    layer.__class__ = kind


def make_slow(model: nn.Module) -> nn.Module:
    """Returns the network with linear layers that do what int8 ones do."""
    for module in model.modules():
        if isinstance(module, WindowAttention):
            become(module.qkv, SlowLinear)
            become(module.proj, SlowLinear)
        elif isinstance(module, Mlp):
            become(module.fc1, SlowLinear)
            become(module.fc2, SlowGroups)
        elif isinstance(module, PatchMerging):
            become(module.reduction, SlowLinear)
    return model


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_logits_are_those_of_whole_numbers(family):
    model, x = build(family), image(3, 40, 24)
    got, exact = swin_moe.optimize(model, int8=True)(x), logits_of(model, x)
    slow = logits_of(make_slow(model), x)
    assert 2e-4 < relative(slow, exact) < BOUND
    assert relative(got, slow) < 0.3 * relative(slow, exact)  # rounded differently where float32 lies between two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["swin_mlp", *OPTIONS])
def test_every_network_is_near_its_own(name, dtype):
    model = build("swin_mlp" if name == "swin_mlp" else "swin", **OPTIONS.get(name, {}))
    optimized = swin_moe.optimize(model, dtype=dtype, int8=True)
    for batch, height, width in ((2, *model.img_size), (3, 21, 34), (0, 32, 32)):
        x = image(batch, height, width, model.config.in_chans)
        got, expected = optimized(x), logits_of(model, x)
        assert got.shape == expected.shape and got.dtype == torch.float32
        assert not batch or relative(got, expected) < BOUND


@pytest.mark.parametrize("options", [{}, EXPERTS, {**EXPERTS, "choice": "expert", "balance_loss": "none"}], ids=str)
def test_threads_change_no_bit(options):
    for dtype in (torch.float32, torch.bfloat16):
        optimized = swin_moe.optimize(build("swin", **options), dtype=dtype, int8=True)
        x = image(5, 40, 56)
        alone = optimized(x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            try:
                assert torch.equal(optimized(x), alone)
            finally:
                torch.set_num_threads(1)


def test_what_cannot_be_in_int8_is_said():
    model = build("swin")
    with pytest.raises(ValueError, match="^optimize: dtype must be one of .*float16 with int8=True, of what is not in"):
        swin_moe.optimize(model, dtype=torch.float64, int8=True)
    with pytest.raises(
        ValueError, match=r"^optimize: dtype must be one of .* \(int8=True multiplies in int8\), got torch.int8$"
    ):
        swin_moe.optimize(model, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="does not require grad"):
        swin_moe.optimize(model, int8=True)(image(1, 32, 32)).sum().backward()
    assert not swin_moe.optimize(model, int8=True).state_dict()


@pytest.fixture(scope="module", params=["digits_dense", "digits_swin_moe"])
def trained(request, tmp_path_factory):
    """Returns the directory of a short run on the digits."""
    root = tmp_path_factory.mktemp(request.param)
    words = ["optim.epochs=2", "optim.warmup_epochs=1", "data.images_per_class=20", "model.embed_dim=24"]
    run_main(train.main, [request.param, f"run.output={root}", "run.name=run", "log.tensorboard=false", *words])
    return root / "run"


def test_commands_run_in_int8(trained, tmp_path, capfd, monkeypatch):
    used, inner = [], OptimizedSwin.forward
    monkeypatch.setattr(
        OptimizedSwin, "forward", lambda self, x: used.append((self.int8, self.dtype)) or inner(self, x)
    )
    int8 = ["engine.optimize=int8", "engine.precision=bf16"]
    image = tmp_path / "0.png"
    pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(image)

    def said(command: Callable, *words: str) -> str:
        used.clear()
        capfd.readouterr()
        run_main(command, [*words])
        return capfd.readouterr().out

    losses, predicted = [], []
    for words in ([], int8):
        text = said(evaluate.main, str(trained / "config.yaml"), f"checkpoint.load={trained}", *words)
        losses.append(float(re.search(r"loss ([\d.]+), top1", text)[1]))
        assert set(used) == ({(True, torch.bfloat16)} if words else set())
        text = said(predict.main, str(trained), "--json", *words, str(image))
        predicted.append({found["name"]: found["probability"] for found in json.loads(text)["classes"]})
        assert set(used) == ({(True, torch.bfloat16)} if words else set())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert predicted[0] != predicted[1] and predicted[0] == pytest.approx(predicted[1], abs=0.02)
    assert "int8, the rest bf16), " in said(throughput.main, str(trained / "config.yaml"), *int8) and used

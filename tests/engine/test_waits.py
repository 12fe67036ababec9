"""A training step waits for the device once; a MoE layer does not on one process, nor where ranks pad by a capacity."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from swin_moe.config import MoEConfig
from swin_moe.config.io import load_config
from swin_moe.moe import dispatch
from swin_moe.moe.dispatch import LocalDispatcher, PaddedDispatcher
from swin_moe.moe.layer import MoELayer
from swin_moe.parallel.exchange import overlap as chunks
from swin_moe.parallel.exchange import transport
from swin_moe.parallel.exchange.padded import PaddedAllToAll
from swin_moe.parallel.groups import single_process_groups
from swin_moe.randomness import RandomContext
from swin_moe.run.session import Session
from swin_moe.train import Trainer
from tests.ranks import TWO_AND_FOUR, run_ranks
from tests.training.cases import TINY, open_tiny
from tests.waits import counted_waits


class AsOnDevice:
    """torch, but a dispatcher must not ask for the number of rows, as on a CUDA device."""

    compiler = SimpleNamespace(is_compiling=lambda: True)

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def on_device(monkeypatch):
    """Rows are counted on the device. Products of experts are one operator, whose inside (here a loop) is unseen."""
    monkeypatch.setattr(dispatch, "torch", AsOnDevice())


def test_the_counter_sees_waits():
    x = torch.arange(4.0)
    with counted_waits() as found:
        x.sum().item(), float(x[0]), x.tolist(), x[x > 1], x.nonzero(), x.cpu(), bool(x.sum() > 0)
    assert found == {"_local_scalar_dense": 3, "tolist": 1, "index": 1, "nonzero": 1, "cpu": 1}
    with counted_waits() as found:
        (x * 2).sum().sqrt(), x.to(torch.float64), torch.where(x > 1, x, 0)
    assert not found


def test_it_sees_backward():
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda g: g * g.sum().item())
    with counted_waits() as found:
        x.sum().backward()
    assert found == {"_local_scalar_dense": 1}


STEPS = {
    "dense": ("model.moe.blocks=[[-1],[-1]]",),
    "by count": (),
    "padded": ("model.moe.backend=padded",),
    "accumulated": ("data.micro_batch=8", "model.moe.backend=padded"),
    "recomputed": ("parallel.recompute=block", "model.moe.backend=padded"),
    "bf16": ("engine.precision=bf16",),
    "fp16": ("engine.precision=fp16", "model.moe.dropout=0.1"),
    "sgd": ("optim.name=sgd", "optim.clip_norm=0", "optim.ema=0"),
    "bias that balances": (
        "model.moe.scores=sigmoid",
        "model.moe.bias_rate=0.01",
        "model.moe.balance_loss=none",
        "model.moe.backend=padded",
    ),
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_step_waits_once(on_device, tmp_path, options):
    config = load_config("digits_swin_moe", [*TINY, f"run.output={tmp_path}", "log.every=100", *options])
    trainer = Trainer(Session(config, single_process_groups(), torch.device("cpu")))
    trainer.engine.loss_scale.value = min(trainer.engine.loss_scale.value, 8.0)  # no overflow
    found, take = [], trainer._train_step

    def step(batches):
        if trainer.progress.step + 1 == trainer.schedule.total:
            return take(batches)  # the last one evaluates, records and saves
        with counted_waits() as waits:
            result = take(batches)
        found.append(dict(waits))
        return result

    trainer._train_step = step
    trainer.run()
    assert len(found) >= 4 and all(waits == {"tolist": 1} for waits in found), found


LAYERS = {
    "official": {},
    "two choices": {"top_k": 2, "normalize_gate": True, "balance_loss": "gshard"},
    "cosine": {"router": "cosine"},
    "by need": {"capacity_factor": 0.0},
    "groups of images": {"capacity_scope": "images", "group_images": 1, "dropout": 0.1},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dispatcher", [LocalDispatcher, PaddedDispatcher])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_layer_on_one_process_waits_for_nothing(on_device, options, dispatcher, training):
    by_need = options.get("capacity_factor") == 0.0
    if dispatcher is PaddedDispatcher:
        options = {"eval_capacity_factor": 0.0 if by_need else 1.0, **options}
    layer = MoELayer(16, 32, MoEConfig(num_experts=4, **options), fc2_bias=True, layer=1, init_std=0.5)
    layer.init_weights(0, "layer")
    layer.dispatcher = dispatcher()
    x = torch.randn(3, 12, 16, requires_grad=True)
    random = RandomContext(7, 1, torch.arange(3))
    with counted_waits() as found:
        y, aux = layer.train(training)(x, random)
        (y.square().sum() + aux).backward()
    # Padded by need, the fullest expert decides how many rows there are.
    assert found == ({"_local_scalar_dense": 1} if by_need and dispatcher is PaddedDispatcher else {})


PADDED = ("model.moe.backend=padded",)
RANKS = {  # case -> options, and waits of the MoE layer in a step of even batches and in one of others, across ranks
    "by capacity": (PADDED, 0, 1),
    "by capacity, recomputed": (("parallel.recompute=block", *PADDED), 0, 2),
    "by capacity, in chunks": (("model.moe.overlap=2", *PADDED), 0, 1),
    "by need": (("model.moe.capacity_factor=0", *PADDED), 1, 1),
    "exact counts": (("model.moe.backend=native",), 1, 1),
}


def waits_of_layers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Returns what counts the waits of all MoE layers from now on; torch's DDP reads flags of the host by the same.

    The order of blocks is made of numbers that the host has, as tensors of the host.
    """
    found: Counter[str] = Counter()
    forward, order = MoELayer.forward, transport.block_permutation

    def on_host(sizes, wanted, device):
        with torch.utils._python_dispatch._disable_current_modes():
            return order(sizes, wanted, device)

    def counted(layer, *arguments, **options):
        with counted_waits() as waits:
            result = forward(layer, *arguments, **options)
        found.update(waits)
        return result

    rows_of = PaddedAllToAll._rows

    def agreed(dispatcher, routing, device):
        rows, even = rows_of(dispatcher, routing, device), dispatcher.even
        with torch.utils._python_dispatch._disable_current_modes():
            dispatcher.even = False
            assert rows == rows_of(dispatcher, routing, device), "not what the ranks agree on"
            dispatcher.even = even
        return rows

    monkeypatch.setattr(MoELayer, "forward", counted)
    monkeypatch.setattr(PaddedAllToAll, "_rows", agreed)
    for module in (transport, chunks):
        monkeypatch.setattr(module, "block_permutation", on_host)
    return found


def count_on_ranks(root: str) -> dict[str, list[int]]:
    """Returns case -> waits of MoE layers in each of the last steps of an epoch, whose last has uneven batches."""
    results, size = {}, torch.distributed.get_world_size()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dispatch, "torch", AsOnDevice())
        waits = waits_of_layers(monkeypatch)
        for case, (options, *_) in RANKS.items():
            always = (f"parallel.expert={size}", "log.every=100", "optim.epochs=1.1")
            trainer = Trainer(open_tiny(Path(root) / case.replace(" ", "-"), *always, *options))
            found: list[int] = []
            trainer.progress.step = trainer.loader.steps_per_epoch - 3
            take = trainer._train_step

            def step(batches, take=take, found=found):
                waits.clear()
                take(batches)
                found.append(sum(waits.values()))
                return len(found) == 4

            trainer._train_step = step  # type: ignore[method-assign]  # a stand-in
            trainer.run()
            results[case] = found
    return results


@pytest.mark.mpi
@pytest.mark.parametrize("world", [1, *TWO_AND_FOUR])
def test_layers_across_ranks_wait_for_nothing_by_capacity(tmp_path, world):
    for result in run_ranks(count_on_ranks, world, tmp_path, str(tmp_path), timeout=900):
        for case, (_, even, uneven) in RANKS.items():
            if world == 1:
                even = uneven = int(case == "by need")
            assert result[case] == [even, even, uneven, even], (case, result[case])

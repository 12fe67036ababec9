"""How many kernels a training step may start: counts of benchmarks/launches.py, held for networks that are quick."""

from contextlib import nullcontext

import launches
import pytest
import torch
import torch.distributed as dist
from torch import fx, nn

from swin_moe import create_model
from swin_moe.ops import extension

# Operators of a training step in bfloat16, a few more than are counted: by the CPU's kernels 476 and 422, by those that
# CUDA has 563 (in which its autocast converts for every norm) and 389.
MOST = {
    ("swin_tiny_patch4_window7_224", "cpu"): 484,
    ("digits_swin_moe", "cpu"): 428,
    ("swin_tiny_patch4_window7_224", "cuda"): 571,
    ("digits_swin_moe", "cuda"): 395,
}


@pytest.mark.skipif(not extension.available("cpu"), reason="the kernels were not built")
@pytest.mark.parametrize(
    "name, kernels",
    # The demo's network has dense blocks and some with experts; the larger one is the same ones more often.
    [row if row[0] == "digits_swin_moe" else pytest.param(*row, marks=pytest.mark.full) for row in MOST],
)
def test_a_training_step_starts_few_kernels(name, kernels):
    model = create_model(name)
    with launches.as_on_cuda() if kernels == "cuda" else nullcontext():
        counts = launches.count_steps(model, model.img_size[0], batch=1, precision="bf16")
    step = counts["forward"] + counts["backward"]
    assert 0 < sum(step.values()) <= MOST[name, kernels], step.most_common(12)
    assert ("swin_moe.bias_gelu" in step and "swin_moe.residual_norm" in step) == (kernels == "cuda")


# The same with blocks compiled: 60 % of what eager may start, and what is counted for the demo's network and for one of
# a dense block and one with experts (142; eager 162).
TWO_BLOCKS = "two blocks"
MOST_COMPILED = {
    TWO_BLOCKS: 146,
    "digits_swin_moe": 360,
    "swin_tiny_patch4_window7_224": 540,
    "swinv2_base_patch4_window16_256": 1560,
    "swin_moe_small_patch4_window12_192_8expert_32gpu_22k": 1800,
}


@pytest.fixture
def forget_graphs():
    import torch._dynamo
    import torch._inductor.config  # loads for seconds: not where tests are only collected

    torch._dynamo.reset()
    with torch._inductor.config.patch(combo_kernels=False, combo_kernels_pointwise_only=False):
        yield
    torch._dynamo.reset()


@pytest.mark.skipif(not extension.available("cpu"), reason="the kernels were not built")
@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.full), 2])
def test_copied_weights_are_cast_no_more(micro_batches):
    name = "digits_swin_moe"
    settings = {"batch": 1, "precision": "bf16", "micro_batches": micro_batches}
    steps = []
    for copies in ("none", "own", "linked"):
        model = create_model(name)
        counts = launches.count_steps(model, model.img_size[0], **settings, copies=copies)
        steps.append(counts["forward"] + counts["backward"])
    cast, made, linked = steps
    num_copies = len(launches.WeightCopies(create_model(name), torch.bfloat16).copies)
    lists = {op: count for op, count in (made - cast).items() if "_foreach" in op}
    assert lists == {"aten._foreach_copy_": micro_batches + 1} | (
        {"aten._foreach_add_": 1} if micro_batches == 2 else {}
    )
    # Two casts a weight (one of a layer of ops/mixed, whose backward writes float32), and from the second micro-batch
    # on autograd's sum of its gradients.
    casts = 2 * micro_batches * num_copies - cast["swin_moe.half_weight"]
    spared = casts + (micro_batches - 1) * num_copies
    assert sum(cast.values()) - sum(made.values()) == spared - sum(lists.values())
    # For them one operator a forward for every block, merging and the embedding of patches, and one of the step.
    depths = create_model(name).config.depths
    units = sum(depths) + len(depths)
    assert linked["aten._foreach_copy_"] == micro_batches * units + 1
    assert sum(cast.values()) - sum(linked.values()) == casts - linked["aten._foreach_copy_"]


@pytest.mark.skipif(not extension.available("cpu"), reason="the kernels were not built")
@pytest.mark.skipif(
    not hasattr(dist, "all_gather_single"), reason="held as torch 2.13 writes programs; 2.11 is counted by hand"
)
@pytest.mark.parametrize(
    # 12 s for the smallest; what is counted of a graph is held below, and that blocks compile in tests/training.
    "name",
    [pytest.param(n, marks=pytest.mark.full) for n in MOST_COMPILED],
)
def test_a_compiled_step_starts_fewer(forget_graphs, name):
    small = {"depths": [1, 1], "moe_blocks": [[-1], [0]]} if name == TWO_BLOCKS else {}
    model = create_model("digits_swin_moe" if small else name, **small)
    counts = launches.count_steps(model, model.img_size[0], batch=1, precision="bf16", compiled="block")
    step = counts["forward"] + counts["backward"]
    assert any(kernel.startswith("triton_") for kernel in step)
    assert 0 < sum(step.values()) <= MOST_COMPILED[name], step.most_common(12)


def test_what_is_counted_of_a_graph(forget_graphs):
    import generated_kernels

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))
    x = torch.randn(8, 64)
    counter = generated_kernels.CompiledCounter(launches.starts_kernel)
    compiled = torch.compile(layer, backend=counter)
    for _ in range(2):
        counter.counts.clear()
        y = compiled(x)
        assert counter.counts == {"extern_kernels.addmm": 2, "triton_poi_fused_gelu": 1}
        counter.counts.clear()
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        # Two products for the second layer and one for the first, whose input needs no gradient; the second bias is
        # a sum, and that of the first one is taken where GELU is differentiated.
        assert counter.counts["extern_kernels.mm"] == 3 and sum(counter.counts.values()) == 5, counter.counts
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(grads, torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))


def test_a_graph_that_returns_numbers(forget_graphs):
    import generated_kernels

    # As graphs of MoE layers do, which keep the sizes of backward.
    graph = fx.Graph()
    x, number = graph.placeholder("x"), graph.placeholder("number")
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, number)), number))
    program = generated_kernels.write_for_device(
        fx.GraphModule(nn.Module(), graph), [torch.randn(4, 8), 3], is_backward=False
    )
    assert generated_kernels.calls(program, launches.starts_kernel) == {"triton_poi_fused": 1}


def test_views_and_allocations_start_none():
    x = torch.randn(4, 6)
    with launches.LaunchCounter() as counter:
        x.view(24)[:3].t()
        torch.empty_like(x)
        assert counter.total == 0
        x.add(1).mul_(2)
    assert counter.total == 2

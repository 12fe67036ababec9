"""Position biases, what model.attention refuses, and that its settings compute the same network."""

import copy
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from swin_moe import create_model
from swin_moe.config import ModelConfig
from swin_moe.models.attention import WindowAttention, check_attention, relative_coords_table, resize_bias_table
from swin_moe.ops import extension
from swin_moe.ops.attention.geometry import relative_position_index, shift_mask
from tests.models.reference import NUMBERS

CPU = torch.device("cpu")


def test_log_spaced_coordinates():
    table = relative_coords_table(3, 3, CPU, torch.float32).view(5, 5, 2)
    assert table[2, 2].tolist() == [0.0, 0.0]
    assert table[4, 0].tolist() == pytest.approx([1.0566417, -1.0566417])  # log2(9) / 3
    assert table[3, 2].tolist() == pytest.approx([0.7739760, 0.0])  # log2(5) / 3
    # A window of 5 asks for the same values at the same offsets if the bias was trained with 3.
    torch.testing.assert_close(relative_coords_table(5, 3, CPU, torch.float32).view(9, 9, 2)[2:7, 2:7], table)
    assert relative_coords_table(1, 1, CPU, torch.float32).tolist() == [[0.0, 0.0]]


def test_bicubic_bias_table():
    golden = NUMBERS["rpb_bicubic_7to12"]
    table = torch.sin(0.1 * torch.arange(169.0)[:, None] + torch.arange(3.0)[None])
    resized = resize_bias_table(table, 12)
    assert resized.shape == (529, 3)
    for row in (0, 264, 528):
        assert resized[row].tolist() == pytest.approx(golden[f"R[{row}]"], abs=1e-5)
    assert resized.abs().sum().item() == pytest.approx(golden["abs_sum"], rel=1e-6)


def test_fused_attention_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="model.attention must be not fused with model.attention_chunk or"):
        ModelConfig(attention="fused", attention_chunk=4)
    with pytest.raises(ValueError, match="model.attention must be one of auto, fused, sdpa, analytic, reference"):
        ModelConfig(attention="flash")
    with torch.device("meta"), pytest.raises(ValueError, match="cannot run: stage 1: 96 channels a head are not in"):
        create_model("swin", attention="fused", num_heads=[3, 2, 12, 24])
    config = ModelConfig(name="swin", attention="fused")
    monkeypatch.setattr(extension, "COMPILED", frozenset({"cpu", "cuda"}))
    check_attention(config)
    check_attention(config, device_type="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float64 is none of float32, bfloat16, float16 on cuda; use"):
        check_attention(config, device_type="cuda", dtype=torch.float64)
    monkeypatch.setattr(extension, "COMPILED", frozenset())
    with pytest.raises(ValueError, match="model.attention=fused cannot run: no compiled kernels: "):
        check_attention(config, device_type="cpu")
    check_attention(replace(config, name="swin_mlp"), device_type="cpu")  # it has no attention
    with torch.device("meta"):
        model = create_model("swin", attention="fused")
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
@pytest.mark.parametrize("size", [32, 44])
def test_every_path_computes_the_same_network(family, size):
    image = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shape = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    results = []
    for attention, chunk in (("reference", 0), ("reference", 3), ("auto", 0), ("sdpa", 0), ("analytic", 0)):
        model = create_model(family, **shape, num_classes=3, attention=attention, attention_chunk=chunk).double()
        model.eval()(image).square().sum().backward()  # nothing is dropped
        results.append([p.grad for p in model.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def small(family, **overrides):
    shape = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
    model = create_model(family, **shape, num_classes=3, **overrides).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # SwinV2 begins with branches times zero
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


class LowRank(torch.nn.Module):
    """A layer put in the place of another, as LoRA does: that one's output plus a product of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.more = torch.nn.Linear(layer.in_features, layer.out_features, bias=False).double()

    def forward(self, x):
        return self.layer(x) + self.more(x)


@pytest.mark.parametrize("family", ["swin", "swinv2"])
@pytest.mark.parametrize("size", [32, 36])
def test_a_layer_in_the_place_of_a_projection_is_called(family, size):
    image = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = small(family).eval()
    wrapped, summed = copy.deepcopy(model), model  # the sum of both weights is the same map
    for block, other in zip(wrapped.layers[0].blocks, summed.layers[0].blocks):
        for name in ("qkv", "proj"):
            layer = LowRank(getattr(block.attn, name))
            setattr(block.attn, name, layer)
            getattr(other.attn, name).weight.data += layer.more.weight.data
    torch.testing.assert_close(wrapped(image), summed(image))
    wrapped(image).sum().backward()
    assert all(block.attn.qkv.more.weight.grad.abs().max() > 0 for block in wrapped.layers[0].blocks)


@pytest.mark.parametrize("attention", ["auto", "reference", "fused"])
@pytest.mark.parametrize("family", ["swin", "swinv2"])
@pytest.mark.parametrize("size", [32, 36])
def test_hooks_on_projections_are_called_and_change_nothing_else(family, attention, size):
    if attention == "fused" and not extension.available("cpu"):
        pytest.skip("needs the compiled kernels")
    image = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, calls = small(family, attention=attention).eval(), []
    expected = model(image)
    for block in model.layers[0].blocks:
        block.attn.qkv.register_forward_pre_hook(lambda module, inputs: calls.append("qkv"))
        block.attn.proj.register_forward_hook(lambda module, inputs, output: calls.append("proj"))
    torch.testing.assert_close(model(image), expected)
    assert calls == ["qkv", "proj"] * 2
    model.layers[0].blocks[0].attn.proj.register_forward_hook(lambda module, inputs, output: output.flip(-1))
    assert not torch.allclose(model(image), expected)


def test_bias_networks_run_again_only_where_their_weights_changed(monkeypatch):
    model, image = small("swinv2").eval(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    layers, ran = [block.attn for block in model.layers[0].blocks], []
    run = WindowAttention._cpb_table
    monkeypatch.setattr(WindowAttention, "_cpb_table", lambda self: ran.append(layers.index(self)) or run(self))

    def blocks_that_ran():
        ran.clear()
        fresh = model(image)  # with gradients: nothing is kept
        assert ran == [0, 1]
        ran.clear()
        with torch.no_grad():
            assert torch.equal(model(image), fresh)
        return list(ran)

    assert blocks_that_ran() == [0, 1]
    assert blocks_that_ran() == []
    with torch.inference_mode():
        model(image)
    layers[0].cpb_mlp[0].weight.data[3, 1] += 1.0  # counts up no version
    assert blocks_that_ran() == [0]
    layers[1].cpb_mlp[2].weight = torch.nn.Parameter(layers[1].cpb_mlp[2].weight.detach() * 2)
    assert blocks_that_ran() == [1]
    layers[0].pretrained_window = 7
    assert blocks_that_ran() == [0]
    assert blocks_that_ran() == []
    model.float()
    image = image.float()
    assert blocks_that_ran() == [0, 1]
    layers[1].cpb_mlp[2].register_forward_hook(lambda module, inputs, output: output + 1.0)
    assert blocks_that_ran() == [1]
    assert blocks_that_ran() == [1]
    assert not any("_kept" in name for name in model.state_dict())


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_a_model_computes_after_another_was_exported_first(family):
    for cache in (relative_coords_table, relative_position_index, shift_mask):
        cache.cache_clear()
    model, image = small(family, attention="reference").eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    exported = torch.export.export(model, (image,)).module()
    result = model(image)
    assert type(result) is torch.Tensor and all(type(p) is torch.nn.Parameter for p in model.parameters())
    torch.testing.assert_close(exported(image), result)
    # And the other way round: what an ordinary forward kept is not given to an export.
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), result)
    with FakeTensorMode(allow_non_fake_inputs=False):
        table = relative_coords_table(4, 4, CPU, torch.float32)
    assert isinstance(table, FakeTensor) and type(relative_coords_table(4, 4, CPU, torch.float32)) is torch.Tensor


def test_one_network_for_five_resolutions_is_compiled_few_times():
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    shape = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [1], "window_size": 4}
    model = create_model("swin", **shape, num_classes=3).eval()
    check = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for height, width in ((32, 32), (40, 48), (24, 56), (36, 36), (44, 28)):
            image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
            torch.testing.assert_close(check(image), model(image))
    torch._dynamo.reset()
    assert 1 <= len(graphs) <= 4  # 3 measured: square maps are one guard
    if extension.available("cpu"):
        assert all(any("window_attention" in target for target in graph) for graph in graphs)

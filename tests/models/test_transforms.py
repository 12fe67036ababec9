"""torch.func.grad of every family equals autograd, losses of routers included; second derivatives are none or right."""

import pytest
import torch

from swin_moe import create_model

SMALL = {
    "img_size": 32,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [1, 2],
    "window_size": 4,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
MOE = {"blocks": [[-1], [0, 1]], "num_experts": 4, "top_k": 2, "aux_loss_weight": 0.1}
CASES = {
    "swin": ("swin", {}),
    "absolute positions": ("swin", {"ape": True}),
    "swinv2": ("swinv2", {}),
    "swin_mlp": ("swin_mlp", {}),
    "analytic": ("swinv2", {"attention": "analytic"}),
    "sdpa": ("swin", {"attention": "sdpa"}),
    "dropout": ("swin", {"drop_rate": 0.3}),
    "padded": ("swin", {"img_size": 40}),
    "moe": ("swin_moe", {"moe": {**MOE, "balance_loss": "load_importance", "gate_noise": 1.0}}),
    "gshard": ("swin_moe", {"moe": {**MOE, "balance_loss": "gshard", "normalize_gate": True, "z_loss_weight": 0.1}}),
    "cosine": ("swinv2", {"moe": {**MOE, "router": "cosine", "capacity_factor": 0.0}}),
    "sigmoid": ("swin_moe", {"moe": {**MOE, "scores": "sigmoid", "balance_loss": "gshard"}}),
    "soft": ("swin_moe", {"moe": {**MOE, "choice": "soft", "balance_loss": "none", "top_k": 1}}),
    "expert choice": ("swin_moe", {"moe": {**MOE, "choice": "expert", "balance_loss": "none", "top_k": 1}}),
}


def network(case):
    name, options = CASES[case]
    model = create_model(name, **{**SMALL, **options})
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return model


def loss_of(model, parameters, image):
    torch.manual_seed(5)  # the draws of a forward without a context come from the global generator
    output = torch.func.functional_call(model, parameters, (image,))
    logits, aux = output if isinstance(output, tuple) else (output, 0.0)
    return logits.square().sum() + aux


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_func_grad_equals_autograd(case, mode):
    model = network(case).train(mode == "train")
    size = CASES[case][1].get("img_size", 32)
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    found, of_image = torch.func.grad(lambda p, x: loss_of(model, p, x), argnums=(0, 1))(parameters, image)
    leaf = image.clone().requires_grad_()
    loss_of(model, parameters, leaf).backward()
    torch.testing.assert_close(of_image, leaf.grad)
    for name, value in parameters.items():
        if value.requires_grad:
            torch.testing.assert_close(found[name], value.grad if value.grad is not None else torch.zeros_like(value))
    assert any(grad.abs().max() > 1e-3 for grad in found.values())


@pytest.mark.parametrize("case", ["swin", "moe"])
def test_a_second_derivative_is_refused_never_wrong(case):
    model = network(case).eval()
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def slope(x):
        return torch.func.grad(lambda y: loss_of(model, parameters, y))(x)

    with pytest.raises(RuntimeError, match="no second derivatives; with model.attention=reference"):
        slope(image).square().sum().backward()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.func.grad(lambda x: slope(x).square().sum())(image.detach())


QUICK = ("swinv2", "swin_mlp", "gshard", "expert choice")
EXPORTED = [case if case in QUICK else pytest.param(case, marks=pytest.mark.full) for case in CASES]


@pytest.mark.parametrize("case", EXPORTED)
def test_an_exported_network_takes_any_number_of_images(case):
    model = network(case).eval()
    size = CASES[case][1].get("img_size", 32)
    image = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = {count: model(image[:count]) for count in (1, 2, 5)}
        program = torch.export.export(model, (image[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        for count, wanted in expected.items():
            torch.testing.assert_close(program.module()(image[:count]), wanted, rtol=1e-6, atol=1e-6)
        fixed = torch.export.export(model, (image[:2].clone(),)).module()
        torch.testing.assert_close(fixed(image[:2]), expected[2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(image), expected[5], rtol=0, atol=0)  # nothing of the tracing is left


@pytest.mark.parametrize("name", ["swin", "swinv2", "swin_mlp"])
def test_a_traced_network_takes_any_number_of_images(name):
    model = create_model(name, **{**SMALL, "img_size": 40}).eval()
    image = torch.randn(3, 3, 40, 40)
    traced = torch.jit.trace(model, image[:2], check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(image), model(image))
    with pytest.raises(RuntimeError, match="torch.jit.trace would fix how many tokens an expert gets; torch.export"):
        torch.jit.trace(network("moe").eval(), image[:, :, :32, :32], check_trace=False)


def test_the_reference_has_second_derivatives():
    model = create_model("swin", **{**SMALL, "attention": "reference"}).double().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def slope(x):
        return torch.func.grad(lambda y: loss_of(model, parameters, y))(x).square().sum()

    found, step = torch.func.grad(slope)(image), torch.randn_like(image) * 1e-6
    torch.testing.assert_close((found * step).sum(), (slope(image + step) - slope(image - step)) / 2, rtol=1e-4, atol=0)

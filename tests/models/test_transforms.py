"""torch.func.grad of every family equals autograd, losses of routers included; second derivatives are none or right."""

import pytest
import torch

from swin_moe import create_model

SMALL = {
    "img_size": 32, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "num_classes": 5,
    "drop_path_rate": 0.0,
}  # fmt: skip
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


def test_the_reference_has_second_derivatives():
    model = create_model("swin", **{**SMALL, "attention": "reference"}).double().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def slope(x):
        return torch.func.grad(lambda y: loss_of(model, parameters, y))(x).square().sum()

    found, step = torch.func.grad(slope)(image), torch.randn_like(image) * 1e-6
    torch.testing.assert_close((found * step).sum(), (slope(image + step) - slope(image - step)) / 2, rtol=1e-4, atol=0)

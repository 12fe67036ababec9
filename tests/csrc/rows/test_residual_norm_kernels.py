"""The CUDA kernels of residual sum and LayerNorm, run on the host, against the Python form in float64."""

import ctypes

import pytest
import torch

from swin_moe.ops import residual_norm
from tests.csrc.emulation import Guarded, build
from tests.csrc.rows.test_row_kernels import ELEMENTS

TENSORS = (
    "x branch factor weight bias sum normed mean rstd grad_sum grad_normed grad_x grad_branch partials grad_weight"
).split()


class ResidualNormLaunch(ctypes.Structure):
    """swin_moe::ResidualNormLaunch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in TENSORS),
        ("rows", ctypes.c_int64),
        ("rows_per_image", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("element", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library():
    loaded = build()
    loaded.swin_moe_residual_norm_blocks.restype = ctypes.c_int64
    loaded.swin_moe_residual_norm_blocks.argtypes = [ctypes.c_int64]
    return loaded


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("channels", [1, 33, 96, 260])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_the_sum(library, dtype, channels, optional, offset):
    images, tokens, rows = 3, 7, 21
    generator = torch.Generator().manual_seed(channels)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    given = {"x": 3 + draw(images, tokens, channels), "branch": draw(images, tokens, channels).to(dtype)}
    given |= {"weight": draw(channels), "bias": draw(channels), "grad_normed": draw(images, tokens, channels)}
    if optional:
        given |= {"factor": torch.tensor([0.0, 1.375, 1.0]), "grad_sum": draw(images, tokens, channels)}
    blocks = library.swin_moe_residual_norm_blocks(rows)
    made = {name: ((images, tokens, channels), torch.float32) for name in ("sum", "normed", "grad_x")}
    made |= {"grad_branch": ((images, tokens, channels), dtype), "partials": ((blocks, 2, channels), torch.float32)}
    made |= {"mean": ((rows,), torch.float32), "rstd": ((rows,), torch.float32)}
    made["grad_weight"] = (2, channels), torch.float32
    memory = {name: Guarded.copy(tensor, offset=offset) for name, tensor in given.items()}
    memory |= {name: Guarded(*what, offset=offset) for name, what in made.items()}
    launch = ResidualNormLaunch(
        rows=rows,
        rows_per_image=tokens,
        channels=channels,
        eps=1e-5,
        element=ELEMENTS[dtype],
        **{name: guarded.address for name, guarded in memory.items()},
    )
    assert library.swin_moe_residual_norm(ctypes.byref(launch), None) == 0
    assert library.swin_moe_residual_norm_backward(ctypes.byref(launch), None) == 0
    assert all(guarded.intact() for guarded in memory.values())
    wide = {name: tensor.double() for name, tensor in given.items()}
    factor, grad_sum = wide.get("factor"), wide.get("grad_sum")
    product = given["branch"] if factor is None else given["branch"] * given["factor"].to(dtype).view(-1, 1, 1)
    expected = residual_norm._forward(wide["x"], product.double(), None, wide["weight"], wide["bias"], 1e-5)
    total, _, mean, rstd = expected
    gradients = residual_norm._backward(
        grad_sum, wide["grad_normed"], total, factor, wide["weight"], mean, rstd, torch.float64
    )
    names = ("sum", "normed", "mean", "rstd", "grad_x", "grad_branch", "grad_weight")
    for name, wanted in zip(names, (*expected, *gradients)):
        got = memory[name].tensor
        rounding = 2e-5 if got.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("channels", [1, 33, 96, 260])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_the_branch(library, dtype, channels, optional, offset):
    images, tokens, rows = 3, 7, 21
    generator = torch.Generator().manual_seed(channels)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    shape = images, tokens, channels
    given = {"x": draw(*shape), "branch": (3 + draw(*shape)).to(dtype), "weight": draw(channels)}
    given |= {"bias": draw(channels), "grad_sum": draw(*shape)}
    if optional:
        given["factor"] = torch.tensor([0.0, 1.375, 1.0])
    blocks = library.swin_moe_residual_norm_blocks(rows)
    made = {"sum": (shape, torch.float32), "grad_branch": (shape, dtype)}
    made |= {"mean": ((rows,), torch.float32), "rstd": ((rows,), torch.float32)}
    made |= {"partials": ((blocks, 2, channels), torch.float32), "grad_weight": ((2, channels), torch.float32)}
    memory = {name: Guarded.copy(tensor, offset=offset) for name, tensor in given.items()}
    memory |= {name: Guarded(*what, offset=offset) for name, what in made.items()}
    launch = ResidualNormLaunch(
        rows=rows,
        rows_per_image=tokens,
        channels=channels,
        eps=1e-5,
        element=ELEMENTS[dtype],
        **{name: guarded.address for name, guarded in memory.items()},
    )
    assert library.swin_moe_norm_residual(ctypes.byref(launch), None) == 0
    assert library.swin_moe_norm_residual_backward(ctypes.byref(launch), None) == 0
    assert all(guarded.intact() for guarded in memory.values())
    wide = {name: tensor.double() for name, tensor in given.items()}
    arguments = wide["branch"], wide.get("factor"), wide["weight"]
    expected = residual_norm._norm_forward(wide["x"], *arguments, wide["bias"], 1e-5)
    gradients = residual_norm._norm_backward(wide["grad_sum"], *arguments, *expected[1:])
    for name, wanted in zip(("sum", "mean", "rstd", "grad_branch", "grad_weight"), (*expected, *gradients)):
        got = memory[name].tensor
        rounding = 2e-5 if got.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=rounding)

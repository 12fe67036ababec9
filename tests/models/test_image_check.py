"""What is no batch of images is refused before the first layer, in one sentence that says the shape."""

import pytest
import torch
from torch import nn

import swin_moe


def network(**options):
    sizes = {"img_size": (16, 16), "patch_size": (2, 2), "embed_dim": 8, "depths": (1,), "num_heads": (2,)}
    return swin_moe.create_model("swin", **sizes | {"window_size": 4, "num_classes": 3} | options).eval()


@pytest.mark.parametrize(
    "image, sentence",
    [
        (torch.zeros(3, 16, 16), r"shape \(B, 3, H, W\), got \(3, 16, 16\); one image needs a batch of one"),
        (torch.zeros(1, 1, 16, 16), r"shape \(B, 3, H, W\), got \(1, 1, 16, 16\)"),
        (torch.zeros(1, 3, 0, 16), r"shape \(B, 3, H, W\), got \(1, 3, 0, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "its own type, torch.float32, got torch.uint8"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.float16), "its own type, torch.float32, got torch.float16"),
    ],
    ids=["unbatched", "grey", "no rows", "bytes", "half"],
)
def test_a_wrong_image_is_told(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        network()(image)


def test_no_tensor_is_told():
    with pytest.raises(TypeError, match=r"takes a tensor \(B, 3, H, W\), got a list"):
        network()([1.0])


def test_what_fits_is_taken():
    assert network()(torch.zeros(0, 3, 16, 16)).shape == (0, 3)
    assert network(in_chans=1)(torch.zeros(2, 1, 16, 16)).shape == (2, 3)
    replaced = network()
    replaced.patch_embed.proj = nn.Conv2d(5, 8, 2, 2)
    assert replaced(torch.zeros(1, 5, 16, 16)).shape == (1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert network()(torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)).shape == (1, 3)

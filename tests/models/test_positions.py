"""Absolute positions of official files: of images of another size, or of another shape with as many tokens."""

import pytest
import torch
import torch.nn.functional as F

from swin_moe.models.official import load_official
from tests.models.test_official import assert_same, official, snapshot, tiny


def _positions(img_size, seed):
    return tiny("swin", img_size=img_size, window_size=2, ape=True, seed=seed)


def test_as_many_positions_of_another_image_are_told_apart_or_refused():
    square, wide, other = _positions((32, 32), 1), _positions((16, 64), 2), _positions((16, 64), 3)
    assert (square.grid, wide.grid) == ((8, 8), (4, 16))
    for state in (official(square), official(other), {"model": official(square)}):
        before = snapshot(wide)
        with pytest.raises(ValueError, match=r"absolute_pos_embed: 64 positions are of 8 x 8 or of 4 x 16 tokens"):
            load_official(wide, state)
        assert_same(wide, before)
    report = load_official(wide, official(square), grid=(8, 8))
    image = square.absolute_pos_embed.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=(4, 16), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(wide.absolute_pos_embed, expected, rtol=0, atol=0)
    assert report.interpolated == [("absolute_pos_embed", "bicubic, 8 x 8 to 4 x 16 tokens")]
    load_official(wide, official(other), grid=[4, 16])
    assert_same(wide, other.state_dict())
    load_official(square, official(other), grid=(4, 16))  # and the other way round
    assert not torch.equal(square.absolute_pos_embed, other.absolute_pos_embed)


@pytest.mark.parametrize("grid", [4, (4,), "44", (0, 16), (2.0, 8), (1, 2, 3), (True, 16)])
def test_a_grid_of_no_image_is_refused(grid):
    with pytest.raises(ValueError, match="grid must be two whole numbers"):
        load_official(_positions((16, 64), 1), {}, grid=grid)


def test_a_grid_of_another_number_of_positions_is_refused():
    wide = _positions((16, 64), 1)
    with pytest.raises(ValueError, match="64 positions in the file, its image has 3 x 8 tokens"):
        load_official(wide, official(wide), grid=(3, 8))


def test_position_embeddings_are_interpolated():
    source, model = tiny("swin", ape=True, seed=1), tiny("swin", ape=True, img_size=(64, 32), seed=2)
    report = load_official(model, official(source))
    image = source.absolute_pos_embed.detach().transpose(1, 2).view(1, 16, 8, 8)
    expected = torch.nn.functional.interpolate(image, size=(16, 8), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.absolute_pos_embed.detach(), expected)
    assert report.interpolated == [("absolute_pos_embed", "bicubic, 8 x 8 to 16 x 8 tokens")]

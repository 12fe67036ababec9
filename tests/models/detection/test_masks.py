"""Masks drawn together are those drawn one by one."""

import pytest
import torch

from swin_moe.models.detection.heads import mask_head
from swin_moe.models.detection.heads.mask_head import paste_masks


@pytest.mark.parametrize("sides", [(2.0, 12.0), (5.0, 90.0)], ids=["small", "mixed"])
def test_masks_drawn_together_are_those_drawn_alone(sides, monkeypatch):
    generator, calls = torch.Generator().manual_seed(5), []
    low = torch.rand(40, 2, generator=generator) * torch.tensor([90.0, 70]) - 12
    side = sides[0] + torch.rand(40, 2, generator=generator) * (sides[1] - sides[0])
    boxes, masks = torch.cat([low, low + side], dim=1), torch.rand(40, 28, 28, generator=generator)
    boxes[3], boxes[7, 2], boxes[11] = float("nan"), boxes[7, 0], boxes[11] + 500
    sample = mask_head.F.grid_sample
    monkeypatch.setattr(mask_head.F, "grid_sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    together = paste_masks(masks, boxes, (61, 83))
    assert 0 < len(calls) < 25  # of 37 masks or so that can be seen
    alone = torch.cat([paste_masks(masks[i : i + 1], boxes[i : i + 1], (61, 83)) for i in range(40)])
    assert torch.equal(together, alone) and together.any(dim=2).any(dim=1).sum() > 25
    monkeypatch.setattr(mask_head, "MOST_PIXELS", 1)
    assert torch.equal(paste_masks(masks, boxes, (61, 83)), together)
    assert paste_masks(masks[:0], boxes[:0], (5, 6)).shape == (0, 5, 6)

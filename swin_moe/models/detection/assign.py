"""Which object a candidate box learns, by overlap.

Facts: open-mmlab/mmdetection 2.11.0, mmdet/core/bbox/assigners/max_iou_assigner.py. There crowd regions train as
background; here background that lies in one trains as nothing.

Shape legend: G objects, N candidates, C crowd regions of one image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from swin_moe.models.detection.boxes import intersection_over_first, intersection_over_union

BACKGROUND, IGNORED = 0, -1


@dataclass(frozen=True)
class Assigner:
    """A candidate is an object's at an overlap of `positive`, and background below `negative`."""

    positive: float
    negative: float
    # Every object also gets the candidates of its largest overlap, where that is this much; None = it does not.
    low_quality: float | None = None
    crowd: float | None = 0.5  # background with at least this share in a crowd region is ignored; None = never

    def __call__(self, candidates_N4: Tensor, objects_G4: Tensor, crowd_C4: Tensor | None = None) -> Tensor:
        """Returns (N,) int64: 1 + the object's index, BACKGROUND or IGNORED. Of equal overlaps the first object's
        counts; a candidate that is the best of several objects goes to the last one."""
        assigned = candidates_N4.new_full((len(candidates_N4),), BACKGROUND, dtype=torch.int64)
        if len(objects_G4):
            self._objects(assigned, intersection_over_union(objects_G4, candidates_N4))
        if crowd_C4 is not None and len(crowd_C4) and self.crowd is not None:
            share = intersection_over_first(candidates_N4, crowd_C4).amax(dim=1)
            assigned[(assigned == BACKGROUND) & (share >= self.crowd)] = IGNORED
        return assigned

    def _objects(self, assigned_N: Tensor, overlap_GN: Tensor) -> None:
        overlap_N, object_N = overlap_GN.max(dim=0)
        assigned_N.fill_(IGNORED)
        assigned_N[overlap_N < self.negative] = BACKGROUND
        assigned_N.copy_(torch.where(overlap_N >= self.positive, object_N + 1, assigned_N))
        if self.low_quality is None or not overlap_GN.shape[1]:
            return
        best_G = overlap_GN.amax(dim=1)
        best_GN = (overlap_GN == best_G[:, None]) & (best_G >= self.low_quality)[:, None]
        numbers = torch.arange(1, len(best_G) + 1, device=assigned_N.device)
        last_N = (best_GN * numbers[:, None]).amax(dim=0)
        assigned_N.copy_(torch.where(last_N > 0, last_N, assigned_N))

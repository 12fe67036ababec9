"""A two-stage detector over any Swin backbone: FPN, proposals, and the heads that a DetectorSpec describes.

Shape legend: B images, C channels, H x W pixels of the padded batch, H_i x W_i of level i.
"""

from typing import Any

from torch import Tensor

from swin_moe.models.dense import FPN, PyramidBackbone
from swin_moe.models.dense.counting import map_sizes
from swin_moe.models.detection import counting
from swin_moe.models.detection.detections import Detections
from swin_moe.models.detection.heads.htc import GlobalBlock
from swin_moe.models.detection.heads.roi_head import RoIHead
from swin_moe.models.detection.heads.rpn import RegionProposals
from swin_moe.models.detection.network import Learned, ObjectNetwork
from swin_moe.models.detection.spec import DetectorSpec
from swin_moe.models.detection.targets import Targets
from swin_moe.models.detection.views import detect_over, views_of
from swin_moe.randomness import RandomContext


class Detector(ObjectNetwork[DetectorSpec]):
    """The network under the official names: backbone, neck, rpn_head, roi_head."""

    def __init__(self, backbone: PyramidBackbone, spec: DetectorSpec, **given: Any) -> None:
        """See ObjectNetwork."""
        super().__init__(backbone, spec, **given)
        if spec.global_attention:
            self.global_block = GlobalBlock(backbone.channels[-1], backbone.config.num_heads[-1])
        self.neck = FPN(backbone.channels, spec.channels, levels=len(spec.proposals.strides))
        self.rpn_head = RegionProposals(spec.proposals, spec.channels)
        self.roi_head = RoIHead(spec)

    def learn(self, image: Tensor, size: Tensor, targets: Targets, random: RandomContext) -> Learned:
        """See ObjectNetwork."""
        maps, aux = self.maps(image, random, size)
        scored = self.rpn_head.scored(maps)
        losses = self.rpn_head.losses(scored, targets, size, self.spec.size_divisor, random)
        found = self.rpn_head.proposals(scored, size, self.spec.proposals.training)
        losses |= self.roi_head.losses(maps, [boxes for boxes, _ in found], targets, size, random)
        return Learned(losses, aux)

    def detect(self, image: Tensor, size: Tensor, original: Tensor) -> list[Detections]:
        """See ObjectNetwork."""
        if self.spec.detections.several:
            return self._over_views(image, size, original)
        maps, _ = self.maps(image, None, size)
        found = self.rpn_head.proposals(self.rpn_head.scored(maps), size, self.spec.proposals.testing)
        return self.roi_head.detect(maps, [boxes for boxes, _ in found], size, original)

    def _over_views(self, image: Tensor, size: Tensor, original: Tensor) -> list[Detections]:
        assert len(image) <= 1, "several views are of one image"
        found = self.spec.detections
        views = views_of(image, size, scales=found.scales, mirror=found.mirror, divisor=self.spec.size_divisor)
        maps = [self.maps(view.image, None, view.size)[0] for view in views]  # which may be collectives
        return [detect_over(self.rpn_head, self.roi_head, views, maps, own) for own in original]

    def counted_beside(self, maps: list[tuple[int, int]]) -> int:
        """See DenseNetwork; 1,000 boxes and 100 masks."""
        return counting.beside_backbone(self.neck, self.rpn_head, self.roi_head, maps)

    def counted(self, size: tuple[int, int]) -> tuple[int, int]:
        """See DenseNetwork."""
        seen, attention = super().counted(size)
        if not self.spec.global_attention:
            return seen, attention
        own = self.global_block.counted(map_sizes(self.backbone.config, size)[-1])
        return seen + own[0], attention + own[1]

    def maps(
        self, image: Tensor, random: RandomContext | None, size: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Returns the maps of all levels (B, C, H_i, W_i) and the backbone's auxiliary loss."""
        pyramid = self.backbone(image, random, size)
        maps = list(pyramid.maps)
        if self.spec.global_attention:
            maps[-1] = self.global_block(maps[-1])
        return self.neck(maps), pyramid.aux

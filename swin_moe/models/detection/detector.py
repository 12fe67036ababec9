"""A two-stage detector over any Swin backbone: FPN, proposals, and the heads that a DetectorSpec describes.

Shape legend: B images, C channels, H x W pixels of the padded batch, H_i x W_i of level i.
"""

from typing import NamedTuple

from torch import Tensor

from swin_moe.models.dense import FPN, PyramidBackbone
from swin_moe.models.dense.counting import map_sizes
from swin_moe.models.dense.network import DenseNetwork
from swin_moe.models.detection import counting
from swin_moe.models.detection.detections import Detections
from swin_moe.models.detection.heads.htc import GlobalBlock
from swin_moe.models.detection.heads.roi_head import RoIHead
from swin_moe.models.detection.heads.rpn import RegionProposals
from swin_moe.models.detection.spec import DetectorSpec
from swin_moe.models.detection.targets import LossSums, Targets
from swin_moe.models.detection.views import detect_over, views_of
from swin_moe.randomness import RandomContext


class Learned(NamedTuple):
    """What a training forward gives."""

    losses: LossSums
    aux: Tensor | None  # the backbone's auxiliary loss; None without MoE blocks


class Detector(DenseNetwork):
    """The network under the official names: backbone, neck, rpn_head, roi_head."""

    def __init__(
        self,
        backbone: PyramidBackbone,
        spec: DetectorSpec,
        *,
        image_size: tuple[int, int] = (800, 1280),
        official_groups: bool = False,
    ) -> None:
        """See DenseNetwork."""
        super().__init__(backbone, image_size=image_size, official_groups=official_groups)
        self.spec = spec
        if spec.global_attention:
            self.global_block = GlobalBlock(backbone.channels[-1], backbone.config.num_heads[-1])
        self.neck = FPN(backbone.channels, spec.channels, levels=len(spec.proposals.strides))
        self.rpn_head = RegionProposals(spec.proposals, spec.channels)
        self.roi_head = RoIHead(spec)

    def forward(
        self,
        image: Tensor,
        size: Tensor,
        targets: Targets | None = None,
        original: Tensor | None = None,
        random: RandomContext | None = None,
    ) -> Learned | list[Detections]:
        """Returns losses where there are targets, else the detections of every image.

        Args:
            image: (B, 3, H, W), zero beyond each image; B may be 0.
            size: (B, 2) int64, height and width of each image in it.
            original: (B, 2) int64, the sizes before resizing, in which detections are given; None = `size`.
                With several views (DetectionSpec) a forward is of one image, or of none.
            random: What training draws from; None = a fresh context from torch's generator.
        """
        if targets is None and self.spec.detections.several:
            return self._over_views(image, size, size if original is None else original)
        if targets is None:
            maps, _ = self.maps(image, None, size)
            found = self.rpn_head.proposals(self.rpn_head.scored(maps), size, self.spec.proposals.testing)
            boxes = [boxes for boxes, _ in found]
            return self.roi_head.detect(maps, boxes, size, size if original is None else original)
        random = RandomContext.fresh(len(image), image.device) if random is None else random
        maps, aux = self.maps(image, random, size)
        scored = self.rpn_head.scored(maps)
        losses = self.rpn_head.losses(scored, targets, size, self.spec.size_divisor, random)
        found = self.rpn_head.proposals(scored, size, self.spec.proposals.training)
        losses |= self.roi_head.losses(maps, [boxes for boxes, _ in found], targets, size, random)
        return Learned(losses, aux)

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

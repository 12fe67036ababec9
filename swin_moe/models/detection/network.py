"""What networks that find objects have in common: they learn from a batch's objects, or say what they find.

Shape legend: B images, H x W pixels of the padded batch.
"""

from abc import abstractmethod
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from swin_moe.models.dense.network import DenseNetwork
from swin_moe.models.dense.pyramid import PyramidBackbone
from swin_moe.models.detection.detections import Detections
from swin_moe.models.detection.targets import LossSums, Targets
from swin_moe.randomness import RandomContext

S = TypeVar("S")


class Learned(NamedTuple):
    """What a training forward gives."""

    losses: LossSums
    aux: Tensor | None  # the backbone's auxiliary loss; None without MoE blocks


class ObjectNetwork(DenseNetwork, Generic[S]):
    """A dense network as its spec describes it, under the official names."""

    def __init__(
        self,
        backbone: PyramidBackbone,
        spec: S,
        *,
        image_size: tuple[int, int] = (800, 1280),
        official_groups: bool = False,
    ) -> None:
        """See DenseNetwork."""
        super().__init__(backbone, image_size=image_size, official_groups=official_groups)
        self.spec = spec

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
        if targets is None:
            return self.detect(image, size, size if original is None else original)
        return self.learn(image, size, targets, drawn(image, random))

    @abstractmethod
    def learn(self, image: Tensor, size: Tensor, targets: Targets, random: RandomContext) -> Learned:
        """Returns the losses of a batch."""

    @abstractmethod
    def detect(self, image: Tensor, size: Tensor, original: Tensor) -> list[Detections]:
        """Returns the detections of every image."""


def drawn(image: Tensor, random: RandomContext | None) -> RandomContext:
    """Returns what training draws from: that which is given, or a fresh context from torch's generator."""
    return RandomContext.fresh(len(image), image.device) if random is None else random

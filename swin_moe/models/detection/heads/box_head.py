"""The head that classifies boxes and refines them.

Facts: open-mmlab/mmdetection 2.11.0, mmdet/models/roi_heads/bbox_heads (convfc_bbox_head.py, bbox_head.py).

Shape legend: R boxes, C channels, S bins per side, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_moe.models.dense.layers import ConvModule, with_initial
from swin_moe.models.detection.boxes import decode, encode
from swin_moe.models.detection.losses import box_loss
from swin_moe.models.detection.sample import Sampled
from swin_moe.models.detection.spec import BoxHeadSpec, Stage
from swin_moe.models.detection.targets import LossSums
from swin_moe.models.layers import ModuleList, widened


class BoxHead(nn.Module):
    """Convolutions, linear layers, class logits and codes, under the official names."""

    def __init__(self, spec: BoxHeadSpec, stage: Stage, channels: int, num_classes: int) -> None:
        super().__init__()
        self.spec, self.stage, self.num_classes = spec, stage, num_classes
        widths = [channels] + [spec.conv_channels] * spec.convs
        if spec.convs:
            self.shared_convs = ModuleList(ConvModule(a, b, 3, norm=spec.norm) for a, b in zip(widths, widths[1:]))
        inputs = [widths[-1] * spec.size**2] + [spec.fc_channels] * spec.fcs
        self.shared_fcs = ModuleList(with_initial(nn.Linear(a, b), "xavier") for a, b in zip(inputs, inputs[1:]))
        self.fc_cls = with_initial(nn.Linear(inputs[-1], num_classes + 1), 0.01)
        self.fc_reg = with_initial(nn.Linear(inputs[-1], 4 if spec.agnostic else 4 * num_classes), 0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (R, K + 1), the last one of background, and codes (R, 4) or (R, 4 K), in at least float32.

        x: (R, C, S, S)
        """
        if self.spec.convs:
            for conv in self.shared_convs:
                x = conv(x)
        x = x.flatten(1)
        for fc in self.shared_fcs:
            x = F.relu(fc(x))
        return widened(self.fc_cls(x)), widened(self.fc_reg(x))

    def losses(self, logits: Tensor, codes: Tensor, sampled: Sampled) -> LossSums:
        """Returns loss_cls and loss_bbox; both are means over all sampled boxes."""
        found = (sampled.label < self.num_classes).nonzero().flatten()
        boxes, target = sampled.rois[found, 1:], sampled.target[found]
        codes = self.codes_of(codes, sampled.label)[found]
        if self.spec.loss == "giou":
            losses = box_loss("giou", decode(boxes, codes, self.stage.stds), target)
        else:
            wanted = encode(boxes, target, self.stage.stds)
            losses = box_loss(self.spec.loss, codes, wanted, beta=self.spec.beta)
        sums = {
            "loss_cls": F.cross_entropy(logits, sampled.label, reduction="sum"),
            "loss_bbox": losses.sum() * self.spec.loss_weight,
        }
        return LossSums(sums, dict.fromkeys(sums, float(len(sampled.label))))

    def codes_of(self, codes: Tensor, label_R: Tensor) -> Tensor:
        """Returns (R, 4), the codes of each box's class; for background those of any class."""
        if self.spec.agnostic:
            return codes
        classes = label_R.clamp(max=self.num_classes - 1)[:, None, None].expand(-1, 1, 4)
        return codes.view(-1, self.num_classes, 4).gather(1, classes)[:, 0]

    def decoded(self, boxes_R4: Tensor, codes: Tensor, size: Tensor) -> Tensor:
        """Returns the boxes (R, 4 K), or (R, 4) for all classes, within an image of this (height, width), (2,)."""
        return decode(boxes_R4, codes, self.stage.stds, size)

    @torch.no_grad()
    def refined(self, rois_R5: Tensor, logits: Tensor, codes: Tensor, size_B2: Tensor, label_R: Tensor) -> Tensor:
        """Returns the boxes (R, 4) that the codes of each box's class make, within the images.

        label: (R,) int64; background is taken for its most probable class.
        """
        likely_R = logits[:, : self.num_classes].argmax(dim=1)
        label_R = torch.where(label_R == self.num_classes, likely_R, label_R)
        image_R = rois_R5[:, 0].to(torch.int64)
        return decode(rois_R5[:, 1:], self.codes_of(codes, label_R), self.stage.stds, size_B2[image_R])

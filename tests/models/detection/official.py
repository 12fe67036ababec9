"""Detectors as the official configurations describe them, with the weights, images and objects of a golden."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from swin_moe.config import ModelConfig
from swin_moe.models.dense import PyramidBackbone
from swin_moe.models.detection.assign import Assigner
from swin_moe.models.detection.detector import Detector
from swin_moe.models.detection.spec import (
    BoxHeadSpec,
    DetectionSpec,
    DetectorSpec,
    MaskHeadSpec,
    ProposalSpec,
    Selection,
    SemanticSpec,
    Stage,
)
from swin_moe.models.detection.targets import Targets
from tests.models.dense.golden import fill, image

LOSSES = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "GIoULoss": "giou"}


def _assigner(given: dict[str, Any]) -> Assigner:
    low = given["min_pos_iou"] if given.get("match_low_quality", True) else None
    return Assigner(given["pos_iou_thr"], given["neg_iou_thr"], low_quality=low)


def _proposals(config: dict[str, Any]) -> ProposalSpec:
    head, train, test = config["rpn_head"], config["train_cfg"], config["test_cfg"]["rpn"]
    border, given = train["rpn"]["allowed_border"], train["rpn_proposal"]
    return ProposalSpec(
        border=None if border < 0 else border,
        assigner=_assigner(train["rpn"]["assigner"]),
        samples=train["rpn"]["sampler"]["num"],
        loss=LOSSES[head["loss_bbox"]["type"]],  # type: ignore[arg-type]  # one of BoxLoss
        beta=head["loss_bbox"].get("beta", 1.0),
        training=Selection(given["nms_pre"], given["max_per_img"]),
        testing=Selection(test["nms_pre"], test["max_per_img"]),
    )


def spec_of(config: dict[str, Any]) -> DetectorSpec:
    """Returns what an official configuration of a detector says."""
    heads, train, test = config["roi_head"], config["train_cfg"]["rcnn"], config["test_cfg"]["rcnn"]
    cascade = isinstance(heads["bbox_head"], list)
    boxes, rules = (heads["bbox_head"], train) if cascade else ([heads["bbox_head"]], [train])
    masks = heads.get("mask_head")  # a Faster R-CNN has none
    masks = masks[0] if isinstance(masks, list) else masks
    box, semantic = boxes[0], heads.get("semantic_head")
    weights = heads.get("stage_loss_weights", [1.0])
    stages = [
        Stage(_assigner(rule["assigner"]), tuple(head["bbox_coder"]["target_stds"]), weight)
        for head, rule, weight in zip(boxes, rules, weights, strict=True)
    ]
    return DetectorSpec(
        num_classes=box["num_classes"],
        channels=config["neck"]["out_channels"],
        proposals=_proposals(config),
        stages=tuple(stages),
        cascade=cascade,
        box_head=BoxHeadSpec(
            convs=box.get("num_shared_convs", 0),
            conv_channels=box.get("conv_out_channels", 256),
            fcs=box.get("num_shared_fcs", 2),
            fc_channels=box["fc_out_channels"],
            norm="norm_cfg" in box,
            agnostic=box["reg_class_agnostic"],
            loss=LOSSES[box["loss_bbox"]["type"]],  # type: ignore[arg-type]  # one of BoxLoss
            loss_weight=box["loss_bbox"]["loss_weight"],
        ),
        mask_head=None if masks is None else MaskHeadSpec(masks["num_convs"], masks["conv_out_channels"]),
        samples=rules[0]["sampler"]["num"],
        interleaved=heads.get("interleaved", False),
        mask_flow=heads.get("mask_info_flow", False),
        semantic=None if semantic is None else SemanticSpec(semantic["num_classes"]),
        detections=DetectionSpec(score=test["score_thr"], suppression=test["nms"]["iou_threshold"]),
    )


def build(golden: dict[str, Any]) -> Detector:
    """Returns the golden's network in evaluation mode; refuses a name or shape of its state dict that is not there."""
    config = golden["config"]
    unused = ("type", "out_indices", "use_checkpoint")
    given = {key: value for key, value in config["backbone"].items() if key not in unused}
    given |= {key: tuple(given[key]) for key in ("depths", "num_heads")}
    network = Detector(PyramidBackbone(ModelConfig(name="swin", img_size=(224, 224), **given)), spec_of(config))
    derived = ("relative_position_index", "num_batches_tracked")
    keys = {name: tuple(shape) for name, shape in golden["keys"].items() if not name.endswith(derived)}
    network.load_state_dict({name: fill(name, shape) for name, shape in keys.items()}, strict=True)
    return network.eval()


def scene(golden: dict[str, Any]) -> Tensor:
    """Returns the golden's images: noise, zero beyond each image's own size."""
    sizes = golden["img_shapes"]
    images = image((len(sizes), 3, *golden["pad"]), golden["name"])
    for one, (height, width) in zip(images, sizes):
        one[:, height:] = 0
        one[:, :, width:] = 0
    return images


def unpacked(bits: Tensor, count: int, height: int, width: int) -> Tensor:
    """Returns (count, height, width) bool of rows of packed bits."""
    flat = np.unpackbits(bits.numpy(), axis=1)[:, : height * width]
    return torch.from_numpy(flat.reshape(count, height, width)).bool()


def ellipses(boxes: Tensor, height: int, width: int) -> Tensor:
    """Returns (G, height, width) bool, the ellipses inscribed in boxes, at pixel centres."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    left, top, right, bottom = boxes[:, :, None, None].unbind(1)
    across = (x - (left + right) / 2) / ((right - left) / 2)
    down = (y - (top + bottom) / 2) / ((bottom - top) / 2)
    return across.square() + down.square() <= 1


def targets_of(golden: dict[str, Any]) -> Targets:
    """Returns the golden's objects."""
    boxes, (height, width) = golden["gt_boxes"], golden["pad"]
    masks = [ellipses(b, height, width) for b in boxes]
    label_map = golden["semantic_labels"][:, 0].long() if "semantic_labels" in golden else None
    return Targets(boxes, golden["gt_labels"], [b[:0] for b in boxes], masks, label_map)

"""Average precision of boxes and masks as COCO measures it, the same digits for any number of ranks.

Ranks keep rows of their own images. At the end rank 0 gets all of them, takes each image once, in the order of the
images' numbers, and lets pycocotools' COCOeval (extra `detection`) measure; every rank gets its numbers. Equal scores
keep the order of (image, place in the image), so who measured what cannot change a digit.

Shape legend: K detections of an image, H height, W width of the image as it is stored.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from swin_moe.data.dense.masks import load_coco_api, rle_area, rle_box, rles_of

# COCOeval.stats, in their order.
NUMBERS = tuple("AP AP50 AP75 AP_small AP_medium AP_large AR_1 AR_10 AR AR_small AR_medium AR_large".split())


@dataclass(frozen=True)
class _ImageRows:
    """An image: its objects, and what was detected in it, as rows of COCO's json."""

    size: tuple[int, int]
    truth: Sequence[Mapping[str, Any]]
    found: list[dict[str, Any]]


class CocoEvaluation:
    """Collects detections image by image, then measures.

    Args:
        num_classes: Labels are below it.
        masks: Measure masks too.
        official: The area that sorts a mask into small, medium or large is its box's, as in mmdetection 2.11, not its
            own, as the COCO API means it.
    """

    def __init__(self, num_classes: int, *, masks: bool, official: bool = False) -> None:
        self._num_classes, self._masks, self._official = num_classes, masks, official
        self._rows: dict[int, _ImageRows] = {}

    def add(
        self,
        image_id: int,
        size: tuple[int, int],
        truth: Sequence[Mapping[str, Any]],
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        masks: Tensor | Sequence[dict] | None = None,
    ) -> None:
        """Notes an image; one that is there already is left as it is.

        Args:
            size: (H, W).
            truth: Rows of Annotation (data/dense/sample.py), of a batch's `truth`.
            boxes: (K, 4), x1 y1 x2 y2 in pixels of the stored image.
            scores, labels: (K,); labels 0-based.
            masks: (K, H, W) bool, or their RLE; needed where masks are measured.
        """
        if image_id in self._rows:
            return
        assert masks is not None or not self._masks, "masks are measured"
        rles = rles_of(masks.cpu().numpy()) if isinstance(masks, Tensor) else list(masks or [])
        corners = boxes.detach().cpu().double().numpy().reshape(-1, 4)
        sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        found = [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score, "iscrowd": 0}
            for box, score, label in zip(sides.tolist(), scores.tolist(), labels.tolist())
        ]
        for row, rle in zip(found, rles):
            row["segmentation"] = rle
        self._rows[image_id] = _ImageRows(size, truth, found)

    def result(self, world_size: int = 1) -> dict[str, float]:
        """Returns name -> per cent, box_AP, box_AP50, ..., mask_AP, ..., alike on all ranks; "samples" counts images.

        -1 where no object is of that kind, as COCO has it. Collective over all ranks.

        Raises:
            ValueError: pycocotools is not installed, or an object has no mask where masks are measured.
        """
        if world_size == 1:
            return self._measure([self._rows])
        gathered: list[Any] | None = [None] * world_size if dist.get_rank() == 0 else None
        dist.gather_object(self._rows, gathered)
        answer: list[Any] = [None]
        if gathered is not None:
            try:
                answer = [self._measure(gathered)]
            except ValueError as error:
                answer = [error]
        dist.broadcast_object_list(answer)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        return answer[0]

    def _measure(self, ranks: Sequence[dict[int, _ImageRows]]) -> dict[str, float]:
        merged: dict[int, _ImageRows] = {}
        for rows in ranks:
            merged = rows | merged
        images = dict(sorted(merged.items()))
        result = self._numbers("bbox", images)
        if self._masks:
            result |= self._numbers("segm", images)
        return result | {"samples": float(len(images))}

    def _numbers(self, kind: str, images: Mapping[int, _ImageRows]) -> dict[str, float]:
        api, evaluation = load_coco_api("coco"), load_coco_api("cocoeval")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            truth_rows = [row for key in images for row in self._truth_rows(kind, key, images[key])]
            # Numbered anew: COCOeval takes an object whose id is 0 for none.
            truth = self._index(api, images, [{**row, "id": n} for n, row in enumerate(truth_rows, 1)])
            rows = [row for key in images for row in images[key].found]
            found = self._index(api, images, [self._found_row(kind, row, n) for n, row in enumerate(rows, 1)])
            measured = evaluation.COCOeval(truth, found, kind)
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
        prefix = "box" if kind == "bbox" else "mask"
        numbers = measured.stats.tolist()
        return {f"{prefix}_{name}": 100 * value if value >= 0 else -1.0 for name, value in zip(NUMBERS, numbers)}

    def _index(self, api: Any, images: Mapping[int, _ImageRows], annotations: list[dict[str, Any]]) -> Any:
        indexed = api.COCO()
        indexed.dataset = {
            "images": [{"id": key, "height": row.size[0], "width": row.size[1]} for key, row in images.items()],
            "annotations": annotations,
            "categories": [{"id": label, "name": str(label)} for label in range(self._num_classes)],
        }
        indexed.createIndex()
        return indexed

    @staticmethod
    def _truth_rows(kind: str, image_id: int, image: _ImageRows) -> list[dict[str, Any]]:
        rows = [{**row, "image_id": image_id} for row in image.truth]
        for row in rows:
            if kind == "segm" and row["segmentation"] is None:
                raise ValueError(
                    f"object {row['id']} of image {image_id} has no mask (segmentation), and masks are evaluated"
                )
        return rows

    def _found_row(self, kind: str, row: dict[str, Any], number: int) -> dict[str, Any]:
        width, height = row["bbox"][2:]
        if kind == "bbox" or self._official:
            return {**row, "id": number, "area": width * height}
        rle = row["segmentation"]
        return {**row, "id": number, "area": float(rle_area(rle)), "bbox": rle_box(rle)}

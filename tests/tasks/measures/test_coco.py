"""COCO's numbers: those of the official evaluation, and the same ones on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swin_moe.tasks.measures.coco import NUMBERS, CocoEvaluation
from tests.ranks import TWO_AND_FOUR, run_ranks

pytest.importorskip("pycocotools")
GOLDEN = Path(__file__).parents[2] / "golden/downstream/coco_eval.json"


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_bytes())


def images_of(data: dict[str, Any]) -> dict[int, tuple]:
    """Returns image number -> arguments of CocoEvaluation.add, labels counting from 0."""
    truth, found = data["ground_truth"], data["detections"]
    result = {}
    for image in truth["images"]:
        key = image["id"]
        objects = [{**row, "category_id": row["category_id"] - 1} for row in truth["annotations"]]
        rows = [row for row in found if row["image_id"] == key]
        box = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).view(-1, 4)
        box[:, 2:] += box[:, :2]
        result[key] = (
            key,
            (image["height"], image["width"]),
            [row for row in objects if row["image_id"] == key],
            box,
            torch.tensor([row["score"] for row in rows], dtype=torch.float64),
            torch.tensor([row["category_id"] - 1 for row in rows], dtype=torch.int64),
            [row["segmentation"] for row in rows],
        )
    return result


def evaluate(keys: list[int], *, official: bool = False, world: int = 1) -> dict[str, float]:
    measure = CocoEvaluation(5, masks=True, official=official)
    images = images_of(golden())
    for key in keys:
        measure.add(*images[key])
    return measure.result(world)


def stats(result: dict[str, float], kind: str) -> list[float]:
    return [result[f"{kind}_{name}"] / 100 for name in NUMBERS]


@pytest.mark.parametrize("official, segm", [(True, "segm"), (False, "segm_mask_area")])
def test_numbers_are_those_of_the_official_evaluation(official, segm):
    """`segm` sorts masks into small, medium and large by their boxes' areas, as mmdetection 2.11 does."""
    expected = golden()["stats"]
    result = evaluate(list(range(1, 41)), official=official)
    torch.testing.assert_close(stats(result, "box"), expected["bbox"], rtol=0, atol=1e-12)
    torch.testing.assert_close(stats(result, "mask"), expected[segm], rtol=0, atol=1e-12)
    assert result["samples"] == 40 and expected["segm"] != expected["segm_mask_area"]


def evaluate_share(shared: bool) -> dict[str, float]:
    """Every rank's numbers, from its images; `shared`: image 1 is padding on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    keys = [key for key in range(40, 0, -1) if key % world == rank]
    return evaluate(keys + [1] * shared, world=world)


def evaluate_shares() -> list[dict[str, float]]:
    """Returns what evaluate_share gives without a shared image, and with one."""
    return [evaluate_share(shared) for shared in (False, True)]


@pytest.mark.parametrize("world", TWO_AND_FOUR)
def test_ranks_change_no_digit_and_an_image_counts_once(world, tmp_path):
    alone = evaluate(list(range(1, 41)))
    assert run_ranks(evaluate_shares, world, tmp_path) == [[alone] * 2] * world


def test_equal_scores_keep_the_order_of_images_and_places():
    images = images_of(golden())
    measures = [CocoEvaluation(5, masks=False) for _ in range(2)]
    for measure, keys in zip(measures, (sorted(images), sorted(images, reverse=True))):
        for key in keys:
            *first, scores, labels, masks = images[key]
            measure.add(*first, torch.full_like(scores, 0.5), labels, masks)
    assert measures[0].result() == measures[1].result()


def test_small_cases_by_hand():
    truth = [{"id": 0, "category_id": 0, "bbox": [0.0, 0, 10, 10], "area": 100.0, "iscrowd": 0, "segmentation": None}]
    box = torch.tensor([[0.0, 0, 10, 10]])
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    measure = CocoEvaluation(2, masks=False)
    measure.add(1, (20, 20), truth, box, one, zero)
    result = measure.result()
    assert result["box_AP"] == pytest.approx(100) and result["box_AP_large"] == -1
    missed = CocoEvaluation(2, masks=False)
    missed.add(1, (20, 20), truth, box[:0], one[:0], zero[:0])
    assert missed.result()["box_AP"] == 0
    assert CocoEvaluation(2, masks=False).result() | {"samples": 0.0} == CocoEvaluation(2, masks=False).result()
    half = CocoEvaluation(2, masks=False)  # IoU 0.6: counts at 0.5, 0.55 and 0.6 of ten thresholds
    half.add(1, (20, 20), truth, torch.tensor([[0.0, 0, 6, 10]]), one, zero)
    assert half.result()["box_AP"] == pytest.approx(30) and half.result()["box_AP50"] == pytest.approx(100)


def test_an_object_without_a_mask_is_named():
    truth = [{"id": 7, "category_id": 0, "bbox": [0.0, 0, 1, 1], "area": 1.0, "iscrowd": 0, "segmentation": None}]
    measure = CocoEvaluation(1, masks=True)
    measure.add(3, (4, 4), truth, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), [])
    with pytest.raises(ValueError, match="object 7 of image 3 has no mask"):
        measure.result()

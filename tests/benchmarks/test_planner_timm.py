"""Data sheets and the counted passes of eager SwinV2 against speeds that somebody else measured on three GPUs."""

import pytest
from planner_timm import INFERENCE, ROWS, predicted

ROW = "tiny", 256, 8


@pytest.mark.parametrize("number", range(len(INFERENCE)), ids=INFERENCE)
def test_inference_is_as_fast_as_others_measured(number):
    images, published = ROWS[ROW][1][number]
    assert predicted(ROW, INFERENCE[number], images, training=False) == pytest.approx(published, rel=0.08)


def test_training_is_as_fast_as_others_measured():
    images, published = ROWS[ROW][2]
    assert predicted(ROW, "rtx_3090", images, training=True) == pytest.approx(published, rel=0.15)

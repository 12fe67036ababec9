"""Charts: values are where their axes say, ranges are drawn, ticks are round."""

import pytest

from swin_moe.planner.report.chart import PALETTE, Panel, Series, draw_panels, even_ticks, scale

BOX = (90, 50 + 96, 600 - 30, 50 + 440 - 66)  # of the first panel


def rows_of(picture, colour, x):
    return [y for y in range(BOX[1], BOX[3] + 1) if picture.getpixel((x, y)) == colour]


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (93.1, 98.9, [93, 94, 95, 96, 97, 98, 99]),
        (5.0, 5.0, [4, 6]),
        (0.0, 0.07, [0, 0.02, 0.04, 0.06, 0.08]),
    ],
)
def test_ticks_are_round_and_around(low, high, ticks):
    found = even_ticks(low, high)
    assert found[0] <= low and found[-1] >= high and len(found) <= 8
    if low < high:
        assert found == pytest.approx(ticks)


def test_scales_are_linear_or_logarithmic():
    assert scale(10, 30, logarithmic=False)(15) == 0.25
    assert scale(1, 100, logarithmic=True)(10) == pytest.approx(0.5)
    assert scale(3, 3, logarithmic=True)(3) == 0.5


def test_points_and_ranges_are_where_their_values_are():
    series = Series("a", [(1, 20.0), (4, 60.0)], [(10.0, 30.0), (60.0, 60.0)])
    picture = draw_panels("title", [Panel("p", "x", [series], from_zero=True)])
    left, top, right, bottom = BOX
    found = rows_of(picture, PALETTE[0], left + 26)  # the first point, its bar through it
    height = bottom - top
    assert found[0] == pytest.approx(bottom - height * 30 / 60, abs=2)
    assert found[-1] == pytest.approx(bottom - height * 10 / 60, abs=2)
    assert len(found) == pytest.approx(height * 20 / 60, abs=6)
    without = draw_panels("title", [Panel("p", "x", [Series("a", series.points)], from_zero=True)])
    assert len(rows_of(without, PALETTE[0], left + 26)) <= 13


def test_every_panel_has_its_place():
    panel = Panel("p", "x", [Series("a", [(1, 1.0), (2, 2.0)])], log_y=True)
    one, three = draw_panels("t", [panel]), draw_panels("t", [panel] * 3)
    assert one.size == (600, 490) and three.size == (1200, 930)
    assert three.crop((0, 490, 600, 930)).tobytes() == one.crop((0, 50, 600, 490)).tobytes()

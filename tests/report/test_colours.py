"""Palettes are told apart by any colour vision: least CIEDE2000 between two colours, as measured, rounded down."""

import numpy as np
import pytest

from swin_moe.demo.draw import ramp
from swin_moe.planner.report import chart, plot
from swin_moe.report import draw
from swin_moe.run.routing_pictures import expert_colour
from swin_moe.tasks.drawing import colour_of
from tests.report.colour_vision import MACHADO, apart, difference, lab

# Palette -> (colours, least between any two, least between neighbours in number). 2 is just seen, 10 at a glance.
PALETTES = {
    "curves of a report": (draw.COLOURS, 10.8, 10.8),
    "charts of the planner": (chart.PALETTE, 10.8, 10.8),
    "bars of memory of the planner": (tuple(plot._COLOURS.values()), 10.8, 13.8),
    "8 experts": ([expert_colour(e) for e in range(8)], 16.3, 20.0),
    "16 experts": ([expert_colour(e) for e in range(16)], 9.8, 11.0),
    "16 classes of boxes, masks, label maps": ([colour_of(k) for k in range(16)], 9.8, 11.0),
}


def test_the_difference_is_ciede2000():
    """Pairs 1 and 34 of the table of Sharma, Wu and Dalal."""
    one = np.array([[50.0, 2.6772, -79.7751], [2.0776, 0.0795, -1.1350]])
    other = np.array([[50.0, 0.0, -82.7485], [0.9033, -0.0636, -0.5514]])
    assert difference(one, other).round(4).tolist() == [2.0425, 0.9082]


@pytest.mark.parametrize("vision", MACHADO)
@pytest.mark.parametrize("name", PALETTES)
def test_colours_of_a_palette_are_told_apart(name, vision):
    colours, least, neighbours = PALETTES[name]
    between = apart(colours, vision)
    assert between.min() >= least, np.unravel_index(between.argmin(), between.shape)
    assert np.diagonal(between, 1).min() >= neighbours


@pytest.mark.parametrize("vision", MACHADO)
@pytest.mark.parametrize("shade", [ramp, draw.shade])
def test_amounts_grow_in_lightness(shade, vision):
    seen = lab(shade(np.linspace(0, 1, 33)), vision)
    assert (np.diff(seen[:, 0]) > 0).all() and seen[-1, 0] - seen[0, 0] > 60

"""Colours by name, as (red, green, blue): what pictures of runs, plans and predictions are drawn in."""

Colour = tuple[int, int, int]

# M. Okabe and K. Ito, "Color Universal Design", 2008: eyes that see red and green alike tell them apart.
ORANGE: Colour = (230, 159, 0)
SKY: Colour = (86, 180, 233)
GREEN: Colour = (0, 158, 115)
YELLOW: Colour = (240, 228, 66)
BLUE: Colour = (0, 114, 178)
VERMILION: Colour = (213, 94, 0)
PURPLE: Colour = (204, 121, 167)
BROWN: Colour = (128, 32, 0)
# Of experts and classes by number: two of the above, then always the one of a grid that is farthest from all before it
# for any colour vision (CIEDE2000 after Machado et al. 2009; greys left out, which stand for other things in pictures).
# The first eight are 16 apart at least, all of them 9.8 (tests/report/test_colours.py).
MANY: tuple[Colour, ...] = (
    ORANGE,
    BLUE,
    (128, 0, 0),
    (0, 224, 224),
    (160, 96, 96),
    (0, 64, 96),
    (192, 224, 160),
    (224, 32, 0),
    (96, 160, 224),
    (0, 0, 224),
    (192, 128, 160),
    (128, 160, 96),
    (128, 64, 64),
    (128, 96, 128),
    (224, 224, 96),
    (0, 128, 32),
)
# A page and what is written on it.
BACKGROUND: Colour = (255, 255, 255)
INK: Colour = (30, 30, 30)
FAINT: Colour = (95, 95, 95)

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
# A page and what is written on it.
BACKGROUND: Colour = (255, 255, 255)
INK: Colour = (30, 30, 30)
FAINT: Colour = (95, 95, 95)

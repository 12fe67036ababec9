"""`swin-moe predict`: command.py reads options and images and prints classes, pixels.py draws objects and label maps.

There is no table: a task of classes gets lines, and one that looks at images (tasks/dense.py) gets files.
What a new kind of answer needs is a function of pixels.py and its words in command.py.
"""

from swin_moe.predict.command import main

__all__ = ["main"]

"""What is measured over many images and ranks, exactly: the same digits however the images are spread.

coco.py: average precision of boxes and masks; confusion.py: label maps. There is no table; a task imports its own.
A new one gathers or sums what ranks hold, once at the end of an evaluation, as integers or in a fixed order.
"""

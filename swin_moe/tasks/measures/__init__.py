"""What dense tasks are measured by, exact on any number of ranks: confusion.py, of label maps.

There is no table: a task builds its measure, adds every image of its rank to it, and asks for the result at the end.
A new one needs that every rank may hold no image, and that sums are of integers or independent of their order.
"""

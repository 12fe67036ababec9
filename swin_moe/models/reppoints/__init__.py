"""RepPoints V2: a detector of one stage that finds objects as sets of points (arXiv:2007.08508), under official names.

The network is data, PointSpec (spec.py). bifpn.py, corners.py and head.py are its parts, assign.py says what a cell
learns, losses.py how, network.py puts it together. There is no table here.
"""

"""Detectors and instance segmentation: network.py has what all share, detector.py puts together what spec.py describes.

A network is a DetectorSpec: its stages, heads and losses are fields, and Mask R-CNN, Cascade Mask R-CNN and HTC differ
in them alone. A new one needs other values; a new kind of head a module in heads/ and a field of the
spec.
"""

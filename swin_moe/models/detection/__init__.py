"""Detectors and instance segmentation: detector.py puts together what spec.py describes as data.

A network is a DetectorSpec: its stages, heads and losses are fields, and Mask R-CNN, Cascade Mask R-CNN and HTC differ
in them alone. A new one needs other values; a new kind of head a module in heads/ and a field of the
spec.
"""

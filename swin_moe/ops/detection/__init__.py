"""Operators of detectors: nms.py and soft_nms.py (which boxes stay), roi_align.py (features of boxes), deform_conv.py
(convolution at places that are computed).

There is no table here: a model imports the function it uses. Each is compiled from csrc/ for CPU and CUDA, and has a plain
torch form for any other device (docs/adding_an_op.md).
"""

"""Operators of detectors: nms.py and soft_nms.py (which boxes stay), roi_align.py (features of boxes), deform_conv.py
(convolution at places that are computed).

There is no table here: a model imports the function it uses. Each is compiled from csrc/ and has a plain torch form for
devices without a kernel (docs/adding_an_op.md).
"""

"""Operators of detectors: nms.py and soft_nms.py (which boxes stay), roi_align.py (features of boxes).

There is no table here: a model imports the function it uses. A new operator needs a file with a plain torch form and a
test against a slow, obvious one (docs/adding_an_op.md).
"""

"""What stands on a detector's maps: rpn.py proposes boxes, box_head.py classifies and refines them, mask_head.py draws
masks, htc.py has what a hybrid cascade adds, roi_head.py puts all after the proposals together.

There is no table: a DetectorSpec says which heads a network has. A new kind is a module here and a field of the spec.
"""

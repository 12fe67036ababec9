"""Semi-supervised detection: network.py holds a student and its teacher, pseudo.py what the teacher finds in images
without labels, losses.py what the student learns from it.

There is no table here: the detector is a DetectorSpec (swin_moe/models/detection/spec.py), and how the teacher is
listened to is Rules (pseudo.py). Another way to listen is another field there and its branch in losses.py.
"""

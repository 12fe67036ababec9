"""Weights into networks: sources.py opens any file, load.py fills, pretrained.py and teacher.py give whole networks.

Formats are checkpoint_tools' business; here a network gets what a file has for it, and is told what it has not.
There is no table: what reads another kind of file is a row of checkpoint_tools.formats.FORMATS.
"""

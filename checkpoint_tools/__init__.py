"""Checkpoints of any format without a GPU, and mostly without torch: looked at, checked, compared, written anew.

verbs/ are the commands, formats/ what files of others look like, sources/ tensors of any format, files/ the bytes.
Each imports only rooms to its right. The table of commands is __main__.VERBS; a new one is a file in verbs/ and a row.
"""

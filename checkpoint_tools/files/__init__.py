"""Kinds of files as named byte ranges, read and written without torch and without executing anything.

torch.save (torch_file.py, torch_legacy.py, torch_writer.py), safetensors, and what puts a finished file in its place.
Nothing here knows a network or a format; a new kind of file needs a subclass of record_file.RecordFile.
"""

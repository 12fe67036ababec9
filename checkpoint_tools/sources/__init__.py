"""Tensors by name, whatever the format: base.py is the contract, stream.py writes a source with bounded memory.

assembled.py joins tensors out of several files, derived.py computes them when they are read, journal.py remembers how
far a long work came. There is no table here: formats/ has it.
"""

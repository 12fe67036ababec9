"""Operators, one file each under the name they have in csrc/: compiled kernels, or the same in Python without them.

attention/, detection/ (of detectors), mixed/ (of a bfloat16 training step on the CPU) and moe/ (of an MoE layer) are
rooms of their own.
There is no table: extension.py finds the library and says which operators it has for which device.
A new operator needs a file here with its obvious form, one in csrc/ and an equality test; docs/adding_an_op.md.
"""

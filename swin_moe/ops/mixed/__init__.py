"""Layers of a training step in bfloat16 (autocast) with float32 weights, on the CPU: linear.py, norm.py, gelu.py and
residual.py.

They are PyTorch's layers with fewer passes over memory, which is kept from step to step (csrc/memory/kept_memory.h).
There is no table here: linear, layer_norm, hidden_layer and add_branch (swin_moe/ops) ask `serves` and call them. A new
one needs a file here with its obvious form, one in csrc/mixed/ and an equality test (docs/adding_an_op.md).
"""

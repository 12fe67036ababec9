"""Operators of an MoE layer: moe_route.py (which expert, which slot), moe_plan.py (the order of rows for experts),
moe_permute.py (rows to experts and back), moe_balance.py (balance losses and the z-loss), moe_layer.py (all of it and
the experts at once, on the CPU).

There is no table here: swin_moe/moe imports the function it uses. Each has the reference in swin_moe/moe as its obvious
form; a new one needs a file here, one in csrc/moe/ and an equality test (docs/adding_an_op.md).
"""

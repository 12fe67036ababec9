"""Measures the machine at hand and writes a hardware file that `swin-moe plan --hardware FILE.yaml` takes.

command.py is the command and puts the file together; machine.py measures products by shape, memory and disk; kernels.py
the CPU's kernels one by one; networks.py times every operator, the host and the update in steps of small networks;
links.py measures collectives between ranks, or reads them from the launcher's preflight file; libraries.py what FSDP2
and torch's checkpoint add. Its tables: SHAPES (machine.py), LINEAR and LAYERS (kernels.py), NETWORKS (networks.py),
SIZES (links.py); another measured case is a row.
"""

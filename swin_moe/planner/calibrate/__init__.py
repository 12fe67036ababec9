"""Measures the machine at hand and writes a hardware file that `swin-moe plan --hardware FILE.yaml` takes.

command.py is the command and puts the file together; machine.py measures products by shape, memory and disk;
networks.py times every operator, the host and the update in steps of small networks; links.py measures collectives
between ranks, or reads them from the launcher's preflight file; libraries.py what FSDP2 and torch's checkpoint add.
Its tables: SHAPES (machine.py), NETWORKS (networks.py), SIZES (links.py); another measured case is a row.
"""

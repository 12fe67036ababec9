"""What one host has: cores, NUMA nodes, GPUs, quota, interfaces and software; and a rank's share of the cores.

topology.py and network.py read it, binding.py shares the cores out, software.py compares what ranks run. There is no
table: another kind of device is a reader in topology.py and a column of the plan.
"""

"""What one host has: cores, NUMA nodes, GPUs, quota, interfaces and software; and a rank's share of the cores."""

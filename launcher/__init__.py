"""Starts a Python program on many ranks and ends them together. Standard library and mpi4py only."""

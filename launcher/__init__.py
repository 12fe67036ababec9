"""Starts a Python program on many ranks and ends them together. Standard library and mpi4py only.

command.py makes the command of mpirun, env.py reads who is who, supervise.py and ending.py leave no rank behind. There
is no table: another MPI is a Flavor in command.py and its names of ranks in env.py. swin_moe is not known here.
"""

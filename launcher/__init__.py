"""Starts a Python program on many ranks and ends them together. Standard library and mpi4py only; knows no swin_moe.

job/ is from the command line to what is run, hosts/ and schedulers/ where, flavors/ by which MPI, machine/ what a host
has, meeting/ how ranks find each other, failure/ why a job failed and what is left of it, output/ what ranks write;
env.py reads who is who, supervise.py and ending.py leave no rank behind, restart.py starts again what failed.
Its tables are FLAVORS (another MPI) and SCHEDULERS (another batch system): a file and a row each.
"""

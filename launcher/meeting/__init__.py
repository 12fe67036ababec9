"""How ranks find each other at start: where rank 0 listens, over which interface; over MPI, or over TCP under srun.

rendezvous.py chooses address, port and interface; tcp.py is for ranks that have no MPI. There is no table: another way
to meet is a case in rendezvous.py.
"""

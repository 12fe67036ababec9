"""How ranks find each other at start: where rank 0 listens, over which interface; over MPI, or over TCP under srun."""

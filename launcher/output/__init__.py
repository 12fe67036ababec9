"""What ranks write, from their pipes to one file a rank and to the screen, without a line torn apart or lost.

pump.py stands beside a rank and takes all that it writes, console.py beside mpirun and shows whole lines with their
rank, lines.py has both spell them. There is no table: a new way from rank to launcher is a class beside pump.py's two.
"""

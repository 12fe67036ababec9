"""What this repository ships by name: configs (listing.py, show.py), machines (machines.py), and the official files of
weights (released.py).

Its tables are data in configs/: counts.tsv (a row a config), released.tsv and released_dense.tsv (a row a file). A new
config needs its row of counts; tests/config/test_shipped.py says which.
"""

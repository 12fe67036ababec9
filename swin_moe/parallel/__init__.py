"""Spreads a model over ranks. sharding.py says which rank holds what, apply.py does it; nothing else knows ranks.

Tables: sharding.TABLE (placements by name) and apply.DISPATCHERS (who moves rows; the rows are in exchange/).
A new placement is a row of names and axes; checkpoints and resharding follow it.
"""

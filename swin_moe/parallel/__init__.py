"""Spreads a model over ranks. sharding.py says which rank holds what, apply.py does it; nothing else knows ranks."""

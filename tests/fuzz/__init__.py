"""Random wrong input to everything a user may call. `python -m tests.fuzz 17:0-2000` runs a range and counts."""

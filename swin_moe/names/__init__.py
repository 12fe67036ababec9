"""Names of parameters in other programs, as plain data: official.py (theirs -> ours), state_dict.py (wrappers around).

Shared by networks and checkpoint_tools; a new prefix or wrapper is a row of a table in state_dict.py.
"""

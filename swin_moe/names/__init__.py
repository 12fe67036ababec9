"""Names of parameters in other programs, as plain data: official.py (official -> ours), state_dict.py (wrappers, prefixes).

Shared by networks and checkpoint_tools; a new prefix or wrapper is a row of a table in state_dict.py.
"""

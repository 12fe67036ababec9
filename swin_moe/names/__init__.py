"""Names of parameters in other programs, as plain data, shared by networks and checkpoint_tools.

official.py has the rules from official names to ours (RENAMED, DROPPED), state_dict.py what stands around a network's
tensors and before their names (WRAPPERS, PREFIXES). A new name, prefix or wrapper is a row of one of these.
"""

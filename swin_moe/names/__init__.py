"""Names as plain data, which several layers share: of parameters in other programs, of files, and of colours.

official.py has the rules from official names to ours (RENAMED, DROPPED), state_dict.py what stands around a network's
tensors and before their names (WRAPPERS, PREFIXES); colours.py those of all pictures, files.py what files are called. A
new name, prefix, wrapper or colour is a row of one of these.
"""

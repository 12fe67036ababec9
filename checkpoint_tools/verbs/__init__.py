"""The commands, one file each, with what they share: arguments.py, text.py (what is printed), same_function.py.

The table is checkpoint_tools.__main__.VERBS: name -> module and what it does, in one line.
A new verb needs a file with main(arguments, comm) and a row there.
"""

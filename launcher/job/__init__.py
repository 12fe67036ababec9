"""From the command line of the launcher to what is run: options, plan, environment, checks of the program.

options.py parses, program.py checks what is to run, prepare.py makes the plan (plan.py) and from it one command. There
is no table: a new option is a field in options.py and its use, mostly in prepare.py.
"""

"""How the commands are asked: their help, and what a shell completes. Loads neither torch nor the commands.

texts.py holds help and examples, a new command's examples being a row of EXAMPLES (or a text of USAGES where it takes
CONFIG key=value); parsers.py the options of commands that load torch, a row of PARSERS each; completion.py what shells
complete, in OPTIONS. tests/commands/test_usage.py holds all of them against the commands.
"""

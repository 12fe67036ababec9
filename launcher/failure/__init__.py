"""Why a job failed and what then: kinds of failure, ranks that stall, processes that are left.

reports.py is the folder in which ranks leave word, kinds.py the exit codes, memory.py, stacks.py and starting.py find
causes, orphans.py ends what is left. No table but the one of kinds.
"""

"""Tasks: what is learned of a batch, one file each; features.py evaluates networks that have no head.

The table is base.TASKS. A new row needs a subclass of base.Task with its network, its loss and its evaluation;
docs/adding_a_task.md.
"""

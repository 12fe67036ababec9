"""What runs and the planner tell each other.

Here are the records of a run (records.py), predictions held against them and hardware files fitted to them (check.py),
and the layout that training asks for (auto.py). No table: a new measured quantity is a Row of compare in check.py.
"""

"""What runs and the planner tell each other: layouts that training asks for, records that predictions are held against
and that hardware files are fitted to. No table; a new measured quantity is a row of check.py:compare.
"""

"""One page of runs: records.py reads what they wrote, results.py asks their networks, page.py puts it together.

The table is CHARTS (charts.py): which records stand in which picture. A new row needs a title, keys and a unit.
"""

"""One page of runs, in files: records.py reads what they wrote, results.py asks their networks, draw.py draws.

charts.py has the table CHARTS, which records stand in which picture, and page.py puts it all together (command.py).
A new row needs a title and keys of records; what no row has is drawn by itself.
"""

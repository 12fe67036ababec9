"""Sections of the schema with options of their own rules: task_options.py (what the options of every task derive from),
detect_options.py (detection), dense_data.py (images with boxes, masks or label maps).

The schema, a folder above, puts them together. A new section is a dataclass here and a field there.
"""

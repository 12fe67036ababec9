"""Data sets that are no folder of images: digits.py (scikit-learn's), lists.py (tables of files).

What may be asked of any: subset.py draws a few images of every class, listing.py has a digest to compare a data set by
and its labels in another numbering. The table is DATASETS, a folder above; a new row needs the members of base.Dataset.
"""

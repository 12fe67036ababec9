"""`swin-moe data check | split`: what a folder of images holds before anything is trained on it, and how to split it.

command.py has the options. find.py tells how images are laid out, a new layout being one function there; examine.py
looks at every image, duplicates.py finds those that stand twice, check.py says it, sheet.py draws it, split.py splits.
"""

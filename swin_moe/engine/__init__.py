"""Engines: a model, its optimizer and its collectives behind one protocol (base.py:Engine), common.py what ours share.

The table is base.ENGINES. A new row needs every member of Engine (checked at start) and says in limits.py what it
serves; docs/adding_an_engine.md.
"""

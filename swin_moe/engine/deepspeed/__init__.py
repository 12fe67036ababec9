"""DeepSpeed as an engine: start.py sets it up, engine.py is the engine, shards.py and flat.py read its flat buffers.

One row of swin_moe.engine.base.ENGINES, no table of its own; nothing outside asks for DeepSpeed by name.
engine.py requires exactly the version whose private attributes are known; another one is tried there first.
"""

"""DeepSpeed as an engine: start.py sets it up, engine.py is the engine, shards.py and flat.py read its flat buffers.

One row of swin_moe.engine.base.ENGINES; nothing outside asks for DeepSpeed by name.
"""

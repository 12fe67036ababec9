"""Rows between ranks: how tokens reach the experts that other ranks own, and come back.

The table is swin_moe.parallel.apply.DISPATCHERS; a new dispatcher needs the members of moe.dispatch.Dispatcher and a
row there. transport.py moves bytes, payload.py says in which dtype, overlap.py cuts them into slices, tune.py measures.
"""

"""What a run is and says: its folder, its state, what it was started with, its metrics and pictures.

session.py starts one (ranks, device, folder, log), state.py is what a checkpoint keeps of it, identity.py compares.
There is no table here; what a step records is step_records.py.
"""

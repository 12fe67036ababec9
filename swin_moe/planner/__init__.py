"""Plans a run without running it: which layouts a world can hold, what each needs in memory and time, and why others
fail. trace.py counts one micro-step on tensors without memory, workload.py adds what is sent, memory.py and
step_time.py what a rank holds and how long a step takes, layouts.py lists candidates; hardware.py reads machines.
The table of machines is configs/hardware/, one file each; a new row needs every figure with its source.
"""

"""A discrete-event simulation of one optimizer step, for worlds that no machine here can hold.

network.py: links of a machine and bytes that each carries in a collective. events.py: what runs at once shares links.
program.py: the computation and collectives of a step, in order. loads.py: how unevenly experts are asked for.
report.py: the step as a user reads it. All ranks are in arrays, one entry a rank, NIC or leaf switch; messages are not
listed. A new collective needs its bytes by link in network.py, and a row in tests/planner/message_simulation.py.
"""

"""What follows from a plan beside time and memory of a step: the schedule's days, energy and price, checkpoints, an
interval for uneven routing, pictures. No table; a new figure is a field of Costs, and a line in docs/planner.md.
"""

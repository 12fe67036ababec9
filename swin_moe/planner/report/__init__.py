"""What follows from a plan beside memory and time of a step.

Here are costs of the schedule and of checkpoints (costs.py), an interval for uneven routing (skew.py), and the picture
of a plan (plot.py). No table: a new figure is a field of Costs, its line in describe_costs, and one in docs/planner.md.
"""

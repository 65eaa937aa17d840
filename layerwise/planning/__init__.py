"""How a plan comes about: a table of actions on layers, their costs and damage; a solver; a search that measures.

`layerwise.planner` goes through these in order.
"""

"""Which channels live and die together: labels, the rule of every op (`rules/`), groups, readers, and what a structure costs.

Imports `tracing`, `layers` and `criteria`.
"""

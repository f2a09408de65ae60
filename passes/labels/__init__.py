"""Every channel gets a label: the walk over a graph, the rule of every op (`rules/`), and the groups that labels make.

Imports `tracing`.
"""

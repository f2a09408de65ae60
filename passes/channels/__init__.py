"""The channels of a network, analysed: what may go, who reads it, and what a structure costs, widths and ranks alike.

Imports `tracing`, `layers`, `labels` and `criteria`.
"""

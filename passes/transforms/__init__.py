"""Graph in, graph out: channels removed, layers factorized, inputs gathered, norms folded, and the oracle that checks.

Imports `tracing`, `layers` and `channels`.
"""

"""What data say of a network: its metric, gradients, and the fine-tune.

Imports `values`, `data` and `compressor.passes`.
"""

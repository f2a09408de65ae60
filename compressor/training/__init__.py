"""What labelled images say of a network: its accuracy, gradients, and the fine-tune.

Imports `values`, `data` and `compressor.passes`.
"""

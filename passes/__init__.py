"""Graph in, graph out: reading a network, knowing its channels, changing it, and fitting it to data.

Imports the values of `compressor.values`, never a back end, a method or a run.
"""

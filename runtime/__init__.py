"""Graph in, engine and measured numbers out.

Imports `compressor.values` and `compressor.passes`, never a method or a run.
"""

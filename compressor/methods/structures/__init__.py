"""Which structures a method may choose, and where on a path from the whole network down a budget is met.

Imports `methods.base`, `compressor.passes` and `compressor.runtime`.
"""

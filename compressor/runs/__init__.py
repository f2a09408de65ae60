"""What a run leaves: its folder, and the result that is handed back.

Imports `values` and `compressor.runtime`.
"""

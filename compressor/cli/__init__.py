"""The command `compressor`: a thin shell over `compressor.api`.

Imports everything; nothing imports it.
"""

"""A user's model and images by name, and what must be seeded so that a run that goes on sees the same.

Imports `compressor.values`.
"""

"""What passes between the rooms: plan, structure, budget, target, measurement, settings, and files that are written whole.

Imports `compressor.errors` alone.
"""

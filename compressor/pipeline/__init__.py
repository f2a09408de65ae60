"""The run, step by step: compress, export, profile; no step is done twice.

Imports everything but `api` and `cli`.
"""

"""Widths and ranks by loss curves: what `CaP` decides by, and the others begin with.

Imports `methods.base` and `methods.structures`.
"""

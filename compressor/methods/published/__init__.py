"""The four papers as their released code does them, one file each: algorithm, formulae, constants, and every difference.

Imports the other rooms of `methods`; `methods/legr.py` and the others beside it are what we do instead.
"""

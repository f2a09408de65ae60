"""The four papers, each in one file, in the paper's order and symbols, with the released code's constants.

Imports the other rooms of `methods`; `methods/legr.py` and the others beside it are what we do instead.
"""

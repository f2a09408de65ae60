"""What `LeGR` and `AACP` share: candidates as trials of a study, rankings as parameters, and the plan that a search ends with.

Imports `compressor.search` and the other rooms of `methods`.
"""

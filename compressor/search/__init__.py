"""Searches: samplers, what a candidate is worth, and the study that joins them."""

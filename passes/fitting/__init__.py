"""Closed forms on data: which channels others can make up for, what removal loses, and the weights that repair it.

Imports every other room of `passes`.
"""

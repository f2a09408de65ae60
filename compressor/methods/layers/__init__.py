"""Each layer by itself: its inputs and singular values, what its states cost, and the plan that follows (`CC`, `Factorize`).

Imports `methods.base` and `methods.structures`.
"""

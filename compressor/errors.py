"""The errors a user can meet: one root, one class per room.

A message names the thing, what was found, what was expected, and what to do about it.
"""


class CompressorError(Exception):
    """Root of every error that this package raises on purpose.

    Attributes:
        exit_code: What the command exits with: 2 for wrong use, 1 for a job that failed.
    """

    exit_code = 2


class TraceError(CompressorError):
    """The model could not be turned into a graph."""


class PassError(CompressorError):
    """A pass refused a graph, or its result did not hold what the pass promises."""

    exit_code = 1


class PlanError(CompressorError):
    """A plan is malformed, or does not fit the model that it is applied to."""


class BudgetError(CompressorError):
    """A budget is malformed, or cannot be met."""


class BackendError(CompressorError):
    """A back end is missing, or failed to build or to run an engine."""

    exit_code = 1


class DataError(CompressorError):
    """Data or weights are missing, malformed, or not finite."""

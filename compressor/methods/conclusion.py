"""From the candidates of a search to the plan that meets the budget, as measured."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from optuna.trial import FrozenTrial

from compressor.errors import BackendError
from compressor.methods.affordable import Affordable
from compressor.methods.paths import AIM, Rows, Widths, fitting
from compressor.plan import Plan
from compressor.search.study import STRUCTURE

logger = logging.getLogger(__name__)

_FINALISTS = 5  # candidates that are built and measured where the budget is a latency


def row_of(trial: FrozenTrial) -> Rows:
    """The structure, (groups,), that a trial stands for."""
    return np.array(trial.user_attrs[STRUCTURE]["widths"], dtype=np.int64)


def concluded(
    affordable: Affordable,
    found: Sequence[FrozenTrial],
    widths: Callable[[FrozenTrial], Widths],
    path: Callable[[FrozenTrial], Rows],
    fill: bool,
) -> tuple[FrozenTrial, Plan]:
    """What a search ends with: a candidate, and the plan that meets the budget by it.

    Of a latency, the best candidate that is measured to meet it is widened where it leaves some; where a few do not meet it,
    the best is narrowed. What was judged is better than what is narrowed afterwards, without a look at what it is worth.

    Args:
        affordable: What the budget allows, by the latency model.
        found: Candidates, the best first.
        widths: The plans of structures by a candidate's parameters.
        path: From a candidate, structures from the whole network down through its own to the narrowest.
        fill: Whether what the budget leaves is used.

    Raises:
        BudgetError: No structure on the path of the best meets the budget.
        BackendError: Not even the engine of the narrowest can be built.
    """
    if "latency" not in affordable.problem.limits:
        return found[0], widths(found[0]).plan(row_of(found[0]))
    chosen, known = _measured(affordable, found, widths)
    best = chosen or found[0]
    row, rows = row_of(best), path(best)
    if chosen is not None and not fill:
        return best, widths(best).plan(row)
    if chosen is not None:
        rows = rows[: int(np.flatnonzero((rows == row).all(axis=1))[0]) + 1]
    return best, fitting(widths(best), rows, affordable.price, fill, known)


def _measured(
    affordable: Affordable, found: Sequence[FrozenTrial], widths: Callable[[FrozenTrial], Widths]
) -> tuple[FrozenTrial | None, dict[tuple[int, ...], float]]:
    """The first candidate that meets a latency as measured, None where a few do not; and what was measured.

    The latency model may be off alike for all that a search has ended with. Candidates are passed over that are too slow, by more
    than it errs otherwise, if it is as far off for them as for the last one that was measured.
    """
    assert affordable.model is not None
    problem, known, off, tried = affordable.problem, dict[tuple[int, ...], float](), 0.0, 0
    limit = AIM * problem.limits["latency"]
    slack = 1.0 + affordable.model.error.median
    guesses = affordable.costs(np.stack([row_of(trial) for trial in found]))["latency"]
    for trial, guess in zip(found, guesses, strict=True):
        if off * guess > limit * slack or tried == _FINALISTS:
            continue
        row, tried = row_of(trial), tried + 1
        try:
            ratio = problem.measure(widths(trial).plan(row)).ratio
        except BackendError as error:
            logger.warning("a finalist is left out, its engine cannot be built: %s", error)
            continue
        logger.info("candidate %d takes %.3f of the original, %.3f by the model", trial.number, ratio, guess)
        known[tuple(row)], off = ratio, ratio / guess
        if ratio <= limit:
            return trial, known
    return None, known

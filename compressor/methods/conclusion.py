"""From the candidates of a search to the plan that meets the budget, as measured."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from optuna.trial import FrozenTrial

from compressor.errors import BackendError
from compressor.methods.base import Problem
from compressor.methods.paths import AIM, Price, Rows, Widths, fitting
from compressor.plan import Plan
from compressor.search.study import STRUCTURE

logger = logging.getLogger(__name__)

_FINALISTS = 5  # candidates that are built and measured where the budget is a latency


def row_of(trial: FrozenTrial) -> Rows:
    """The structure, (groups,), that a trial stands for."""
    return np.array(trial.user_attrs[STRUCTURE]["widths"], dtype=np.int64)


def concluded(
    problem: Problem,
    found: Sequence[FrozenTrial],
    widths: Callable[[FrozenTrial], Widths],
    path: Callable[[FrozenTrial], Rows],
    price: Price,
    fill: bool,
) -> tuple[FrozenTrial, Plan]:
    """What a search ends with: a candidate, and the plan that meets the budget by it.

    Of a latency only a few of the best candidates are measured, as the latency model may be off. The first that meets the budget is
    widened where it leaves some; where none does, the best is narrowed. What was judged is better than what is narrowed
    afterwards, without a look at what it is worth: a ResNet-56 at half the latency kept 78.7 % by a narrowed best of `LeGR`.

    Args:
        problem: With the budget.
        found: Candidates within the limits by the latency model, the best first.
        widths: The plans of structures by a candidate's parameters.
        path: From a candidate, structures from the whole network down through its own to the narrowest.
        price: See `fitting`.
        fill: Whether what the budget leaves is used.

    Raises:
        BudgetError: No structure on the path of the best meets the budget.
        BackendError: Not even the engine of the narrowest can be built.
    """
    if "latency" not in problem.limits:
        return found[0], widths(found[0]).plan(row_of(found[0]))
    known: dict[tuple[int, ...], float] = {}
    chosen = None
    for trial in found[:_FINALISTS]:
        row = row_of(trial)
        try:
            known[tuple(row)] = problem.measure(widths(trial).plan(row)).ratio
        except BackendError as error:
            logger.warning("a finalist is left out, its engine cannot be built: %s", error)
            continue
        logger.info("candidate %d takes %.3f of the original as measured", trial.number, known[tuple(row)])
        if known[tuple(row)] <= AIM * problem.limits["latency"]:
            chosen = trial
            break
    best = chosen or found[0]
    row, rows = row_of(best), path(best)
    if chosen is not None and not fill:
        return best, widths(best).plan(row)
    if chosen is not None:
        rows = rows[: int(np.flatnonzero((rows == row).all(axis=1))[0]) + 1]
    return best, fitting(widths(best), rows, price, fill, known)

"""From the candidates of a search to the plan that meets the budget, as measured."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from optuna.trial import FrozenTrial

from compressor.errors import BackendError
from compressor.methods.structures.affordable import Affordable
from compressor.methods.structures.paths import AIM, Rows, Widths, distinct, fitting
from compressor.methods.structures.slower_sequences import refused
from compressor.passes.channels.rank_axes import RankAxis
from compressor.search.study import STRUCTURE
from compressor.values.plan import Plan

logger = logging.getLogger(__name__)

_FINALISTS = 5  # candidates that are built and measured where the budget is a latency
_BEST = 1 / 4  # of all structures: only among these are finalists looked for


def row_of(trial: FrozenTrial) -> Rows:
    """The structure, (groups,), that a trial stands for."""
    return np.array(trial.user_attrs[STRUCTURE]["widths"], dtype=np.int64)


def select_measured(
    affordable: Affordable,
    found: Sequence[FrozenTrial],
    widths: Callable[[FrozenTrial], Widths],
    path: Callable[[FrozenTrial], Rows],
    fill: bool,
    widen: bool = True,
) -> tuple[FrozenTrial, Plan]:
    """What a search ends with: a candidate, and the plan that meets the budget by it.

    Of a latency, the best candidate that is measured to meet it is widened where it leaves some; where a few do not meet it,
    the best is narrowed. What was judged is better than what is narrowed afterwards, without a look at what it is worth.

    Args:
        affordable: What the budget allows, by the latency model.
        found: Candidates, the best first.
        widths: The plans of structures by a candidate's parameters.
        path: From a candidate, structures from the whole network down through its own to the narrowest.
        fill: See `fitting`.
        widen: Whether a candidate that meets the latency is widened, or taken as it is.

    Raises:
        BudgetError: No structure on the path of the best meets the budget.
        BackendError: Not even the engine of the narrowest can be built.
    """
    if "latency" not in affordable.problem.limits:
        return found[0], widths(found[0]).plan(row_of(found[0]))
    chosen, known = _finalist(affordable, found, widths)
    best = chosen or found[0]
    row, rows = row_of(best), path(best)
    if chosen is not None and not widen:
        return best, widths(best).plan(row)
    if chosen is not None:
        rows = rows[: int(np.flatnonzero((rows == row).all(axis=1))[0]) + 1]
    return best, fitting(widths(best), rows, affordable.price, fill, known)


def accepted(affordable: Affordable, plan: Plan, space: Widths, path: Rows, fill: bool, accept: bool | None) -> Plan:
    """A plan, met anew without the sequences in it that are not measured to be faster than the plain layers.

    Args:
        affordable: What a latency is guessed to fall with.
        plan: The plan.
        space: The plans of structures.
        path: Structures from the whole network down, among which the plan was found.
        fill: See `fitting`.
        accept: Whether sequences have to be faster; see `judged`.

    Raises:
        BudgetError: Without them no structure of the path meets the budget.
    """
    groups = space.problem.channels.groups
    while slow := refused(space.problem, plan, accept):  # every round, at least one layer more is left plain
        plain = [isinstance(group, RankAxis) and group.layer in slow for group in groups]
        path = distinct(np.where(plain, [group.size for group in groups], path))
        plan = fitting(space, path, affordable.price, fill)
    return plan


def _finalist(
    affordable: Affordable, found: Sequence[FrozenTrial], widths: Callable[[FrozenTrial], Widths]
) -> tuple[FrozenTrial | None, dict[tuple[int, ...], float]]:
    """The first candidate that meets a latency as measured, None where a few do not; and the measured shares of the original.

    The latency model may be biased where a search has ended. Once engines have shown by how much (the median of measured to
    predicted), candidates whose prediction, corrected by that, exceeds the limit by more than the model's median error are not
    built. They come from the better quarter of all structures: below it, narrowing the best is the better way.
    """
    assert affordable.model is not None
    problem, known = affordable.problem, dict[tuple[int, ...], float]()
    limit, slack = AIM * problem.limits["latency"], 1.0 + affordable.model.error.median
    of_structure: dict[tuple[int, ...], FrozenTrial] = {}
    for trial in found:
        of_structure.setdefault(tuple(row_of(trial)), trial)
    trials = list(of_structure.values())[: max(int(_BEST * len(of_structure)), _FINALISTS)]
    predicted = affordable.costs(np.stack([row_of(trial) for trial in trials]))["latency"]
    biases: list[float] = []
    for trial, share in zip(trials, predicted, strict=True):
        row = row_of(trial)
        if len(known) == _FINALISTS or (biases and np.median(biases) * share > limit * slack):
            continue
        try:
            known[tuple(row)] = problem.measure(widths(trial).plan(row)).ratio
        except BackendError as error:
            logger.warning("a finalist is left out, its engine cannot be built: %s", error)
            known[tuple(row)] = float("inf")
            continue
        logger.info("candidate %d takes %.3f of the original, %.3f by the model", trial.number, known[tuple(row)], share)
        if known[tuple(row)] <= limit:
            return trial, known
        biases.append(known[tuple(row)] / share)
    return None, known

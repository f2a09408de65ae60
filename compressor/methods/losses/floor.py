"""Down a walk to an accuracy: the last network whose repaired accuracy on the hold-out holds a floor."""

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.methods.losses.allocation import Allocation, Weighting
from compressor.search.fitness import Judge
from compressor.values.plan import Plan


def last_above(problem: Problem, allocation: Allocation, weighting: Weighting, judge: Judge, floor: float) -> Plan:
    """The narrowest network found, by bisection, that is right on a share of the hold-out.

    Args:
        problem: The network.
        allocation: By loss curves.
        weighting: Whose walk is gone down.
        judge: Repairs a candidate and looks at the hold-out.
        floor: The share, 0 to 1.

    Raises:
        BudgetError: The original is not.
    """
    path, whole = allocation.path(weighting), problem.costs(problem.channels.full)["macs"]

    def accuracy(position: int) -> float:
        plan = allocation.plan(path[position])
        found = judge(plan).accuracy / 100
        share = problem.costs(problem.channels.structure(plan))["macs"] / whole
        problem.progress.stage(f"{share:.3f} of the MACs: right on {found:.3f} of the hold-out")
        return found

    if (original := accuracy(0)) < floor:
        raise BudgetError(f"CaP(floor={floor}): the original itself is right on {original:.3f} of the hold-out")
    low, high = 0, len(path)  # `low` is right often enough, `high` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accuracy(middle) >= floor else (low, middle)
    return allocation.plan(path[low])

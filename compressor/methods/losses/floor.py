"""Down a walk to a floor: the last network whose metric on the hold-out holds it once the network is repaired."""

from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.methods.losses.allocation import Allocation, Weighting
from compressor.search.fitness import Judge
from compressor.tasks.metric import Metric
from compressor.values.plan import Plan


def last_above(problem: Problem, allocation: Allocation, weighting: Weighting, judge: Judge, metric: Metric, floor: float) -> Plan:
    """The narrowest network found, by bisection, that is good enough.

    Args:
        problem: The network.
        allocation: By loss curves.
        weighting: Whose walk is gone down.
        judge: Repairs a candidate and looks at the hold-out by the metric.
        metric: What it looks by.
        floor: The worst value, as for `CaP`.

    Raises:
        BudgetError: The original is not.
    """
    path, whole = allocation.path(weighting), problem.costs(problem.channels.full)["macs"]
    worst = metric.floor(floor)

    def value(position: int) -> float:
        plan = allocation.plan(path[position])
        found = metric.number(judge(plan).metric)
        share = problem.costs(problem.channels.structure(plan))["macs"] / whole
        problem.progress.stage(f"{share:.3f} of the MACs: {metric.name} {metric.text(found)} on the hold-out")
        return found

    if metric.lost(worst, original := value(0)) > 0:
        raise BudgetError(f"CaP(floor={floor}): the original itself has {metric.text(original)} on the hold-out")
    low, high = 0, len(path)  # `low` is good enough, `high` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if metric.lost(worst, value(middle)) <= 0 else (low, middle)
    return allocation.plan(path[low])

"""Loss curves of a network's groups, and of its ranks where these are axes too: computed once per run."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from compressor.methods.base import Problem
from compressor.passes.channels.rank_axes import axes_of
from compressor.passes.fitting.losses import Curve, loss_curves
from compressor.passes.fitting.rank_losses import rank_curves
from compressor.passes.fitting.ranking import Ranking
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.values.files import digest_of_tensors
from compressor.values.plan import digest_of


def curves_of(
    problem: Problem, images: Calibration, settings: Compensation, probes: int, groups: bool = True, by_reader: bool = False
) -> dict[str, Curve]:
    """By the name of each group and axis.

    Args:
        problem: The network.
        images: For the statistics.
        settings: Of compensation: images, positions, ridge and memory.
        probes: Images that sensitivities are measured on; 0 for none.
        groups: Whether those of groups are wanted, and not only those of ranks.
        by_reader: Whether the rankings for each reader alone are wanted, too.

    Raises:
        DataError: The features are not finite.
    """
    channels, axes = problem.channels, axes_of(problem.channels)
    seen = digest_of_tensors({f"{k}.{n}": x for k, batch in enumerate(images.batches) for n, x in enumerate(batch)})
    weights = digest_of_tensors(channels.graph.state_dict())
    key = digest_of([channels.digest, weights, settings.to_dict(), probes, problem.seed, seen, by_reader])[:12]

    def of_groups() -> dict[str, object]:
        return _plain(loss_curves(channels, images, settings, probes, problem.seed), by_reader)

    def of_ranks() -> dict[str, object]:
        return _plain(rank_curves(channels, axes, images, settings, probes, problem.seed), False)

    found: dict[str, Curve] = {}
    if groups:
        problem.progress.stage("statistics, ranking and sensitivity of every group")
        found = _curves(problem.once(f"loss curves of all groups {key}", of_groups))
    if axes:
        problem.progress.stage("losses of the ranks of every layer")
        found |= _curves(problem.once(f"loss curves of all ranks {key}", of_ranks))
    return found


def _plain(curves: Mapping[str, Curve], by_reader: bool) -> dict[str, object]:
    found = {}
    for name, curve in curves.items():
        alone = {node: _listed(own) for node, own in curve.by_reader.items()} if by_reader else {}
        found[name] = {"sensitivity": curve.sensitivity, "ranking": _listed(curve.ranking), "by_reader": alone}
    return {"curves": found}


def _listed(ranking: Ranking) -> list[list[float]]:
    return [ranking.order.tolist(), ranking.loss.tolist()]


def _curves(record: Mapping[str, Any]) -> dict[str, Curve]:
    found = {}
    for name, own in record["curves"].items():
        by_reader = {node: _ranking(*listed) for node, listed in own["by_reader"].items()}
        found[name] = Curve(_ranking(*own["ranking"]), own["sensitivity"], by_reader)
    return found


def _ranking(order: list[int], loss: list[float]) -> Ranking:
    return Ranking(np.array(order, dtype=np.int64), np.array(loss, dtype=np.float64))

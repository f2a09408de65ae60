"""Loss curves of a network's groups, and of its ranks where these are axes too: computed once per run."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from compressor.errors import DataError
from compressor.methods.base import Problem
from compressor.passes.channels.search_space import depth_of, ranks_of
from compressor.passes.fitting.branch_losses import branch_curves
from compressor.passes.fitting.compensated_ranking import Ranking
from compressor.passes.fitting.losses import Curve, loss_curves
from compressor.passes.fitting.rank_losses import rank_curves
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.values.files import digest_of_tensors
from compressor.values.plan import digest_of


def images_for_losses(problem: Problem) -> Calibration:
    """The images that losses take their statistics from.

    Raises:
        DataError: There are none.
    """
    if problem.calibration is None:
        raise DataError("a ranking by loss needs images for its statistics (no labels): pass calibrate=… or train=…")
    return problem.calibration


def curves_of(problem: Problem, images: Calibration, settings: Compensation, probes: int, groups: bool = True) -> dict[str, Curve]:
    """By the name of each group and axis.

    Args:
        problem: The network.
        images: For the statistics.
        settings: Of compensation: images, positions, ridge and memory.
        probes: Images that sensitivities are measured on; 0 for none.
        groups: Whether those of groups are wanted, and not only those of ranks.

    Raises:
        DataError: The features are not finite.
    """
    distance = problem.distance_of_outputs
    channels, axes, depth = problem.channels, ranks_of(problem.channels), depth_of(problem.channels)
    seen = digest_of_tensors({f"{k}.{n}": x for k, batch in enumerate(images.batches) for n, x in enumerate(batch)})
    weights = digest_of_tensors(channels.graph.state_dict())
    key = digest_of([channels.digest, weights, settings.to_dict(), probes, problem.seed, seen])[:12]
    about = (images, settings, probes, problem.seed, distance)

    def known(what: str, stage: str, work: Callable[[], Mapping[str, Curve]]) -> dict[str, Curve]:
        problem.progress.stage(stage)
        return _curves(problem.once(f"loss curves of all {what} {key}", lambda: _plain(work())))

    found: dict[str, Curve] = {}
    if groups:
        found |= known("groups", "statistics, ranking and sensitivity of every group", lambda: loss_curves(channels, *about))
    if axes:
        found |= known("ranks", "losses of the ranks of every layer", lambda: rank_curves(channels, axes, *about))
    if depth:
        found |= known("branches", "losses of every branch", lambda: branch_curves(channels, depth, *about))
    return found


def _plain(curves: Mapping[str, Curve]) -> dict[str, object]:
    return {
        "curves": {
            name: {"sensitivity": own.sensitivity, "ranking": [own.ranking.order.tolist(), own.ranking.loss.tolist()]}
            for name, own in curves.items()
        }
    }


def _curves(record: Mapping[str, Any]) -> dict[str, Curve]:
    found = {}
    for name, own in record["curves"].items():
        order, loss = own["ranking"]
        found[name] = Curve(Ranking(np.array(order, dtype=np.int64), np.array(loss, dtype=np.float64)), own["sensitivity"])
    return found

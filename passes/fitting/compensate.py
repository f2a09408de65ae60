"""`Compensate`: repair a narrowed network in closed form, layer by layer, without labels and without a gradient.

Both networks, the original and the narrowed one, are run side by side over the calibration images. At every layer the
weights are fitted so that the narrowed network gives what the original gives there (`regression.py`):

    original   x  ── W ──►  y  ──►  norm ──►  + shortcut
    narrowed   x' ── W'──►  y'                + shortcut'

    y* = y + (shortcut - shortcut') / scale        the target: also what the narrowed shortcut has lost
    W', b' = argmin E||y* - W' x' - b'||²          from Cov(x') and Cov(y*, x')

x' comes from the network as repaired so far, so errors do not pile up (`features="narrowed"`; asymmetric in the words of
the papers). With `features="original"` statistics are those of the original network and only layers that lost
inputs are repaired, as CaP published it.

A removed channel that is constant leaves through b': E[x] is that of the patches with their padding, so a constant
that the padding cuts off at the border is folded in by its mean.

A layer that the plan factorizes stays one layer here, with a weight that the factorization writes exactly
(`rank_reduction.py`); `FactorizeConv` afterwards loses nothing more.
"""

import logging
from dataclasses import dataclass, field

from torch import fx

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.fitting.fit_layers import fit_on_original, fit_side_by_side
from compressor.passes.fitting.jobs import jobs_behind, jobs_of
from compressor.passes.fitting.settings import Compensation, Repair
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.original_outputs import Original
from compressor.passes.tracing.modes import eval_mode, full_float32
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.passes.transforms.base import PassResult
from compressor.values.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compensated:
    """A repaired network.

    Attributes:
        graph: The network.
        repairs: What was done, in the order of the layers.
    """

    graph: fx.GraphModule
    repairs: tuple[Repair, ...] = field(default=())


class Compensate:
    """A pass: repair what a plan's removal has done.

    Args:
        channels: The analysis of the original network, whose outputs are the target.
        plan: What was removed.
        calibration: Images.
        settings: How.
        seed: Of the positions that are looked at.
        original: What the original gives on these images, at these positions, where it is known; for `features="narrowed"`.
    """

    def __init__(
        self,
        channels: ChannelGraph,
        plan: Plan,
        calibration: Calibration,
        settings: Compensation | None = None,
        seed: int = 0,
        original: Original | None = None,
    ) -> None:
        self._channels, self._plan, self._calibration, self._original = channels, plan, calibration, original
        self._settings, self._seed = settings or Compensation(), seed

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Return a repaired copy of the narrowed graph, or itself where the plan removes nothing.

        Raises:
            PassError: The graph is not the original narrowed by the plan.
            DataError: The features are not finite.
        """
        found = self.run(gm)
        return PassResult(found.graph, bool(found.repairs))

    def run(self, gm: fx.GraphModule) -> Compensated:
        """The same, with what was done to each layer."""
        masks = self._channels.kept_masks(self._plan)
        if all(mask.all() for mask in masks) and not (self._plan.reads or self._plan.factors or self._plan.removed):
            return Compensated(gm)
        settings, result = self._settings, quiet_deepcopy(gm)
        jobs = jobs_of(self._channels, masks, result, self._plan)
        jobs = [job for job in jobs_behind(self._channels, self._plan, jobs) if job.changes or settings.side_by_side]
        own = (self._channels, result, jobs, self._calibration.first(settings.images), settings, self._seed)
        with full_float32(), eval_mode(self._channels.graph), eval_mode(result):
            repairs = fit_side_by_side(*own, self._original) if settings.side_by_side else fit_on_original(*own)
        result.recompile()
        worst = max((r.after for r in repairs), default=0.0)
        logger.info("Compensate: %d layers fitted, %.3f of a layer's variance is lost at worst", len(repairs), worst)
        return Compensated(result, tuple(repairs))

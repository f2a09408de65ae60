"""`Nearness`: how far plans' repaired networks are from the original, to compare ways to allocate without labels."""

from dataclasses import replace
from typing import Any

from torch import fx

from compressor.methods.base import Problem
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.distances import distance_between
from compressor.passes.statistics.original_outputs import Remembered
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.passes.transforms.remove_channels import RemoveChannels
from compressor.values.plan import Plan

_IMAGES, _POSITIONS = 512, 12  # that networks are repaired on for a comparison; with fewer, wide layers fit noise and look bad


class Nearness:
    """See the module.

    Args:
        problem: The network.
        settings: How it is repaired; None for not at all.
        used: Images to repair it on.
        spared: Images to look at it by.
    """

    def __init__(self, problem: Problem, settings: Compensation | None, used: Calibration, spared: Calibration) -> None:
        self._channels, self._seed, self._spared = problem.channels, problem.seed, spared
        self._distance = problem.distance_of_outputs
        self._settings, self._used, self._original = None, used, None
        if settings is not None:
            images, positions = min(settings.images, _IMAGES), min(settings.positions, _POSITIONS)
            self._settings, self._used = replace(settings, images=images, positions=positions), used.first(images)
            if settings.features == "narrowed":
                self._original = Remembered(self._channels, self._used, positions, self._seed, settings.memory_mb)
        self._wanted = self._outputs(self._channels.graph)

    def __call__(self, plan: Plan) -> float:
        """The distance of the plan's network from the original on the images spared."""
        graph = RemoveChannels(plan, self._channels)(self._channels.graph).graph.eval()
        if self._settings is not None:  # which leaves factorized layers plain, with weights that are as good as factorized
            graph = Compensate(self._channels, plan, self._used, self._settings, self._seed, self._original)(graph).graph
        else:
            graph = FactorizeConv(plan.factors)(graph).graph
        return distance_between(self._distance, self._wanted, self._outputs(graph))

    def _outputs(self, graph: fx.GraphModule) -> list[Any]:
        return [self._distance.kept(y) for y in Prefix(graph, self._spared, Shelf()).finish()]

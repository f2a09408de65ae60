"""`CC`: channels and ranks of each layer together (Li et al., CVPR 2021, "Towards Compact CNNs via Collaborative Compression").

Input channels and singular values of a layer are units of one kind, removed in the order of what their loss, and that of one unit
more, does to the network's loss (`units.py`). How far each layer goes is decided for all at once (`rates.py`).
What is left of a layer is then taken from its original weights: the channels that stay, and the largest singular values.

`CC.published()` is the released code. What goes beyond it, each an option:

* `information="features"`: what a layer's features lose on real images *after* compensation, instead of a Taylor expansion of the
  loss in its weights. Channels and ranks are then those of `CaP(space="channels+ranks")`, which decides: a channel is removed with
  its producer, for all who read it, and what it saves there counts;
* `information="fisher"`: the mean of the squared gradients of batches instead of the square of the mean gradient;
* `allocation="curves"`: the curves themselves instead of an exponential fitted to each;
* a budget of latency is met in milliseconds: what a state costs is measured on the target, layer by layer;
* `gathers`: a channel that all readers drop is removed with its producer; where only some do, they read the others through a
  gather (`all`, as published), only where that is measured to be faster (`paying`), or never (`none`);
* `accept`: a layer stays factorized only if it is measured to be faster than it would be without;
* `compensation` after the cut, with the truncation that loses least of the output on real images (`rank_reduction.py`).

Where this differs from the released code: the multiplier is found by bisection against the costs of the network that comes
out (there, a dead producer's MACs are not counted as saved), in widths and ranks that the target's `align` allows; channels of
frozen and block-wise tied groups stay, also behind a gather; a decomposition that saves nothing is not made; R is
min(outputs, inputs * kernel); curves are drawn from at most a hundred states; gradients are those of at most `images` training
images (10,000; there, all). Its traps (a backup that aliases the weights on a
CPU, an index map that collapses) have no counterpart here.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from compressor.data.images import unaugmented
from compressor.errors import BudgetError
from compressor.methods.base import Problem
from compressor.methods.cap import CaP
from compressor.methods.layers.plans import UnitPlans
from compressor.methods.layers.rates import Allocation, Curves, Exponential, fitted
from compressor.methods.layers.times import LayerTimes
from compressor.methods.layers.units import Array, Layer, State, removal_path, sorted_path
from compressor.methods.structures.accept import refused
from compressor.methods.structures.levels import least_accepted
from compressor.passes.channels.layer_costs import Layer as Sized
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.product import Product
from compressor.training.gradients import squared_gradients
from compressor.values.files import digest_of_tensors
from compressor.values.plan import Plan, digest_of
from compressor.values.settings import check

_SPACES: dict[str, Literal["channels", "ranks", "channels+ranks"]] = {
    "channels": "channels",
    "ranks": "ranks",
    "both": "channels+ranks",
}


@dataclass(frozen=True)
class CC:
    """Compress channels and ranks together.

    Attributes:
        units: What may go: input `channels`, singular values (`ranks`), or `both`.
        information: What losses rest on: the `features`; or what an element of a weight is worth, by `fisher` or the squared
            mean `gradient`. The settings that follow are of the latter two, but `accept` and `compensation`.
        allocation: Over layers: by `exponential`s fitted to their curves, or by the `curves`.
        gathers: `all`, `paying` or `none`; see the module.
        accept: Whether factorized layers have to be faster on the target; `None`: where the budget is a latency.
        gamma: Weight of the look-ahead.
        share: Of a layer's units, removed per step.
        most: The largest share of a layer's MACs that goes.
        images: Training images for the gradients, without augmentation; those of the hold-out where there is no training data.
        compensation: How the network is repaired; None for not at all.

    Raises:
        BudgetError: A setting is out of range.
    """

    units: Literal["both", "channels", "ranks"] = "both"
    information: Literal["features", "fisher", "gradient"] = "features"
    allocation: Literal["curves", "exponential"] = "curves"
    gathers: Literal["none", "paying", "all"] = "none"
    accept: bool | None = None
    gamma: float = 0.9
    share: float = 0.01
    most: float = 0.95
    images: int = 10_000
    compensation: Compensation | None = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, BudgetError, {"gamma": (0, 10), "share": (1e-6, 1), "most": (0.01, 0.999), "images": (1, 1e9)})
        if self.information == "features" and (self.gathers != "none" or self.allocation != "curves"):
            raise BudgetError("CC: gathers and exponentials are of information='fisher' or 'gradient'")

    @property
    def name(self) -> str:
        """As the command knows it."""
        return "cc"

    @classmethod
    def published(cls, images: int = 10_000) -> "CC":
        """As in the released code; gathers wherever a layer alone drops a channel."""
        return cls("both", "gradient", "exponential", "all", accept=False, images=images, compensation=None)

    @property
    def reduces_ranks(self) -> bool:
        """See `Method`."""
        return self.units != "channels"

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return {"name": self.name, **asdict(self)}

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            BudgetError: The budget cannot be met; the closest that can is said.
            DataError: There is no labelled data; by features: there are no calibration images.
        """
        if self.information == "features":
            return CaP(space=_SPACES[self.units], accept=self.accept, compensation=self.compensation).plan(problem)
        plans = UnitPlans(problem.channels, self.gathers != "none", problem.target.align)
        layers = self._layers(problem, plans)
        if not layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plans.layers.items())[:5])
            raise BudgetError(f"CC: there is no layer that it could compress ({reasons})")
        paths = {name: self._path(problem, name, layer) for name, layer in layers.items()}
        ungathered: set[str] = set()
        slower = partial(refused, problem, accept=self.accept, reads=self.gathers == "paying")
        while True:  # every round takes the gather or the ranks from at least one more layer
            allocation = self._allocation(problem, layers, paths)
            plan_at = partial(_plan_at, plans, allocation, frozenset(ungathered))
            plan, slow = least_accepted(problem, plan_at, ": compressed as far as it can be", slower)
            if not slow:
                return plan
            for name in slow.gathers:
                ungathered.add(name)
                removable = plans.removable(name, gathers=False) & (self.units != "ranks")
                layers[name] = replace(layers[name], removable=removable)
            for name in slow.sequences:
                layers[name] = replace(layers[name], ranks=False)
            for name in slow.gathers | slow.sequences:
                paths[name] = self._path(problem, name, layers[name])

    def _layers(self, problem: Problem, plans: UnitPlans) -> dict[str, Layer]:
        graph = problem.channels.graph
        names = [name for name, reason in plans.layers.items() if reason is None]
        problem.progress.stage(f"gradients on at most {self.images} images")
        batches = unaugmented(problem.validate if problem.train is None else problem.train)
        squares = squared_gradients(graph, batches, self.images, self.information == "fisher", problem.progress)
        found = {}
        for name in names:
            product = Product(graph.get_submodule(name))
            own = [self._as_units(tensor, product) for tensor in (product.weight.detach(), squares[f"{name}.weight"])]
            removable = plans.removable(name) & (self.units != "ranks")
            if removable.any() or self.units != "channels":
                found[name] = Layer(own[0], own[1], removable, self.units != "channels")
        return found

    @staticmethod
    def _as_units(tensor: Tensor, product: Product) -> Array:
        """(outputs, inputs, kernel); the kernel's order does not matter, as long as both have the same."""
        wide = tensor.double().cpu().flatten(2) if tensor.dim() > 2 else tensor.double().cpu()[:, :, None]
        return np.ascontiguousarray((wide.transpose(0, 1) if product.transposed else wide).numpy())

    def _path(self, problem: Problem, name: str, layer: Layer) -> list[State]:
        """States of a layer, computed once per run; kept as the step at which each channel goes."""
        tensors = {"weight": torch.from_numpy(layer.weight), "information": torch.from_numpy(layer.information)}
        settings = [self.gamma, self.share, self.most, digest_of_tensors(tensors)]
        key = digest_of([name, layer.removable.tolist(), layer.ranks, *settings])

        def work() -> dict[str, object]:
            path = removal_path(layer, self.gamma, self.share, self.most)
            gone = [
                next((k for k, state in enumerate(path) if j not in state.kept), len(path)) for j in range(layer.weight.shape[1])
            ]
            rows = [[state.rank, state.loss, state.elements] for state in path]
            return {"gone": gone, "states": rows}

        problem.progress.stage(f"units of {name}")
        record = problem.once(f"units of {name} {key[:12]}", work)
        gone = np.array(cast("list[int]", record["gone"]))
        rows = cast("list[tuple[int | None, float, int]]", record["states"])
        return [State(tuple(np.flatnonzero(gone > k).tolist()), *row) for k, row in enumerate(rows)]

    def _allocation(self, problem: Problem, layers: dict[str, Layer], paths: dict[str, list[State]]) -> Allocation:
        if self.allocation == "exponential":
            curves = {name: fitted(sorted_path(layer, self.share, self.most)) for name, layer in layers.items()}
            return Exponential(curves, paths, self.most)
        positions = {name: Sized.of(problem.channels, name).positions for name in paths}
        macs = {name: [float(state.elements * positions[name]) for state in path] for name, path in paths.items()}
        if "latency" not in problem.limits:
            return Curves(paths, macs)
        times = LayerTimes(problem)
        measured = {name: times(name, path, layers[name].weight.shape[1]) for name, path in paths.items()}
        known = {name: own for name, own in measured.items() if own is not None}
        rate = float(np.median([own[0] / macs[name][0] for name, own in known.items()])) if known else 1.0
        costs = {name: known.get(name, [rate * own for own in macs[name]]) for name in paths}
        return Curves(paths, costs)


def _plan_at(plans: UnitPlans, allocation: Allocation, ungathered: frozenset[str], level: float) -> Plan:
    return plans.plan(allocation(level), ungathered)

"""CC: channels and ranks of each layer together, as published (Li et al., CVPR 2021).

Released code: `liuguoyou/Towards-Compact-CNNs-via-Collaborative-Compression`.

**Information loss.** W is a layer's weight as a matrix, H the square of the mean gradient of the loss for each of its elements.
Replacing W by W^ loses, by a Taylor expansion of first order, squared element by element, l(W^) = sum H (W^ - W)².

**Global compression rate optimization** (`layers/cc_rates.py`). The losses of each layer, its units ordered once by what each loses
alone, are fitted by p1 exp(p2 c), c the share of its MACs that is saved, and

    minimise sum F_l p1_l exp(p2_l c_l)   subject to   sum F_l c_l = what is to be saved
    =>  c_l = ln(x / (p1_l p2_l)) / p2_l,  clipped to [0, 0.95]                          F_l: its MACs

**Multi-step heuristic removal** (`layers/cc_removal.py`). Input channels and singular values are units of one kind; 1 % of a
layer's units go per step, those with the lowest score: what is lost without the unit, and what is lost if one more went,
averaged over the n - 1 that are then left (D = W_k - W, U S V' the decomposition of W_k):

    score    = backward + gamma forward                                                    gamma = 0.9
    backward = sum H D²
    forward  = backward - 4/(n-1) sum H D W_k + 1/(n-1) [sum H W_k² + sum H (U² S² V'²)]

**The cut.** What is left of a layer is taken from its original weights: the channels that stay, and the largest singular values.

Where this differs from the released code:

* the multiplier x is found by bisection against the costs of the network that comes out (there: a million steps of gradient
  descent, and a dead producer's MACs are not counted as saved), in widths and ranks that the target's `align` allows;
* a channel that all readers drop is removed with its producer; where only some do, they read the others through a gather;
* channels of frozen and block-wise tied groups stay; a layer is a sequence only where that is smaller (there: unless channels
  alone reach the rate); R is min(outputs, inputs * kernel); curves are drawn from at most a hundred states;
* gradients are those of at most `images` training images (there: of all);
* the released code's traps (a backup that aliases the weights on a CPU, an index map that collapses) have no counterpart;
* `compress` recalibrates batch norms of the result where nothing is compensated, before any training.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from compressor.data.images import unaugmented
from compressor.errors import BudgetError
from compressor.methods.base import MethodSettings, Problem
from compressor.methods.layers.cc_rates import Exponential, fitted
from compressor.methods.layers.cc_removal import Array, Layer, State, removal_path, sorted_path
from compressor.methods.layers.unit_plans import UnitPlans
from compressor.methods.structures.bisect_level import least_within
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.product import Product
from compressor.training.gradients import squared_gradients
from compressor.values.files import digest_of_tensors
from compressor.values.plan import Plan, digest_of
from compressor.values.settings import check


@dataclass(frozen=True)
class PublishedCC(MethodSettings):
    """Compress channels and ranks together.

    Attributes:
        units: What may go: input `channels`, singular values (`ranks`), or `both`.
        gamma: Weight of the look-ahead.
        share: Of a layer's units, removed per step.
        most: The largest share of a layer's MACs that goes.
        images: Training images for the gradients, without augmentation; those of the hold-out where there is no training data.
        compensation: How the network is repaired; not at all, as published.

    Raises:
        BudgetError: A setting is out of range.
    """

    name: ClassVar[str] = "cc"
    of_paper: ClassVar[bool] = True
    units: Literal["both", "channels", "ranks"] = "both"
    gamma: float = 0.9
    share: float = 0.01
    most: float = 0.95
    images: int = 10_000
    compensation: Compensation | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, BudgetError, {"gamma": (0, 10), "share": (1e-6, 1), "most": (0.01, 0.999), "images": (1, 1e9)})

    @property
    def reduces_ranks(self) -> bool:
        """See `Method`."""
        return self.units != "channels"

    def plan(self, problem: Problem) -> Plan:
        """Decide what stays.

        Raises:
            BudgetError: The budget cannot be met; the closest that can is said.
            DataError: There is no labelled data.
        """
        plans = UnitPlans(problem.channels, problem.target.align)
        layers = self._layers(problem, plans)
        if not layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plans.layers.items())[:5])
            raise BudgetError(f"CC: there is no layer that it could compress ({reasons})")
        paths = {name: self._path(problem, name, layer) for name, layer in layers.items()}
        curves = {name: fitted(sorted_path(layer, self.share, self.most)) for name, layer in layers.items()}
        rates = Exponential(curves, paths, self.most)
        return least_within(problem, lambda level: plans.plan(rates(level)), ": compressed as far as it can be")

    def _layers(self, problem: Problem, plans: UnitPlans) -> dict[str, Layer]:
        graph = problem.channels.graph
        names = [name for name, reason in plans.layers.items() if reason is None]
        problem.progress.stage(f"gradients on at most {self.images} images")
        batches = unaugmented(problem.validate if problem.train is None else problem.train)
        squares = squared_gradients(graph, batches, self.images, problem.progress)
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
            inputs = range(layer.weight.shape[1])
            gone = [next((k for k, state in enumerate(path) if j not in state.kept), len(path)) for j in inputs]
            return {"gone": gone, "states": [[state.rank, state.loss, state.elements] for state in path]}

        problem.progress.stage(f"units of {name}")
        record = problem.once(f"units of {name} {key[:12]}", work)
        gone = np.array(cast("list[int]", record["gone"]))
        rows = cast("list[tuple[int | None, float, int]]", record["states"])
        return [State(tuple(np.flatnonzero(gone > k).tolist()), *row) for k, row in enumerate(rows)]

"""What the states of a layer cost in milliseconds: measured at a few widths and ranks on the target, interpolated between them."""

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from compressor.errors import BackendError
from compressor.methods.base import Problem
from compressor.methods.units import State
from compressor.passes.layer_costs import Layer
from compressor.passes.products import Product
from compressor.runtime.pieces import Variant, times

_INPUTS = (0.25, 0.5, 1.0)  # of the layer's inputs
_RANKS = (0.125, 0.25, 0.5)  # of its full rank


class LayerTimes:
    """Milliseconds of the states of layers.

    Args:
        problem: The network and the target.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self, name: str, path: Sequence[State], inputs: int) -> list[float]:
        """Of every state of a layer; where it cannot be measured, in proportion to its elements.

        A factorized state never costs less than the grid says of the nearest width and rank on it.
        """
        problem = self._problem
        product = Product(problem.channels.graph.get_submodule(name))
        full = min(product.outputs, product.columns)
        widths = sorted({max(1, round(share * inputs)) for share in _INPUTS})
        ranks = sorted({max(1, round(share * full)) for share in _RANKS})
        problem.progress.stage(f"milliseconds of {name} over widths and ranks")
        rows = [
            Variant(w, product.outputs, w, None if r is None else ("svd", (min(r, product.kernel * w),)))
            for w in widths
            for r in (None, *ranks)
        ]
        try:
            found = times(problem.channels, name, rows, problem.target, problem.once, problem.seed)
        except BackendError:
            positions = Layer.of(problem.channels, name).positions
            return [float(state.elements * positions) * 1e-9 for state in path]
        grid = np.array(found).reshape(len(widths), 1 + len(ranks))
        result = []
        for state in path:
            width = float(np.clip(len(state.kept), widths[0], widths[-1]))
            if state.rank is None:
                result.append(float(np.interp(width, widths, grid[:, 0])))
                continue
            rank = float(np.clip(state.rank, ranks[0], ranks[-1]))
            if len(ranks) == 1 or len(widths) == 1:
                result.append(float(grid[-1, -1]))
                continue
            result.append(float(RegularGridInterpolator((widths, ranks), grid[:, 1:])([[width, rank]])[0]))
        return result

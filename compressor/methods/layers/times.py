"""What the states of a layer cost in milliseconds: measured at a few widths and ranks on the target, interpolated between them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from compressor.errors import BackendError
from compressor.methods.base import Problem
from compressor.methods.layers.units import State
from compressor.passes.layers.forms import FORMS
from compressor.passes.layers.product import Product
from compressor.passes.layers.sizes import sizes_of
from compressor.runtime.latency_model.pieces import Variant, times

_INPUTS = (0.25, 0.5, 1.0)  # of the layer's inputs
_RANKS = (0.125, 0.25, 0.5, 1.0)  # of its full rank


class LayerTimes:
    """Milliseconds of the states of layers.

    Args:
        problem: The network and the target.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self, name: str, path: Sequence[State], inputs: int) -> list[float] | None:
        """Of every state of a layer; None where it cannot be measured."""
        problem = self._problem
        product = Product(problem.channels.graph.get_submodule(name))
        full = min(product.outputs, product.columns)
        widths = sorted({max(1, round(share * inputs)) for share in _INPUTS})
        ranks = sorted({max(1, round(share * full)) for share in _RANKS}) if any(s.rank is not None for s in path) else []
        problem.progress.stage(f"milliseconds of {name} over widths and ranks")
        cells = {}
        for width in widths:
            sizes = replace(sizes_of(product.module), inputs=width)
            able = FORMS["svd"].refuses(sizes) is None
            for rank in (0, *ranks):
                form = ("svd", (min(rank, FORMS["svd"].full(sizes)[0]),)) if rank and able else None
                cells[width, rank] = Variant(width, product.outputs, width, form)
        variants = list(dict.fromkeys(cells.values()))
        try:
            measured = times(problem.channels, name, variants, problem.target, problem.once, problem.seed)
        except BackendError as error:
            problem.progress.stage(f"{name} cannot be measured alone ({error}): it counts by its MACs, as others take for one")
            return None
        found = dict(zip(variants, measured, strict=True))
        dense = [found[cells[width, 0]] for width in widths]
        grid = np.array([[found[cells[width, rank]] for rank in ranks] for width in widths])
        result = []
        for state in path:
            kept = float(np.clip(len(state.kept), widths[0], widths[-1]))
            if state.rank is None:
                result.append(float(np.interp(kept, widths, dense)))
                continue
            along = [float(np.interp(state.rank, ranks, row)) for row in grid]  # at every width, then between widths
            result.append(float(np.interp(kept, widths, along)))
        return result

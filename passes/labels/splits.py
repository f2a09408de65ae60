"""Channels that a view has spread over several axes, before it is known along which of them they may go.

A `view` from (n, c) to (n, heads, c / heads) leaves labels that differ along two axes. Removal can only take
whole slices along an axis, so in the end the labels are tied along all axes but one; which one depends on what
comes next. A product of matrices over (c / heads) leaves the heads free, a channel shuffle the columns. So the
choice waits until an op needs it:

    linear ──view──► Split (3, heads, d) ──permute, unbind──► three Grids ──matmul──► `heads` is chosen, d is tied
"""

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from compressor.passes.labels.labeler import Grid, IntArray, Labeler, Value


def settle(value: Value, labeler: Labeler, allowed: Collection[int] | None = None) -> Value:
    """Choose one axis for every grid of a value, and tie the labels along the others.

    Args:
        value: Any value; one without grids comes back as it is.
        labeler: Takes the ties.
        allowed: Axes of `value` that the op at hand would rather leave free; all, where left out.
    """
    if not value.grids:
        return value
    axes = dict(value.axes)
    for grid in value.grids:
        if grid.split.chosen is None:
            _choose(grid, labeler, allowed)
        found = _labels_of(grid)
        if found is None:
            continue
        axis, labels = found
        if axis in axes:
            own = axes.pop(axis)
            if labeler.is_blank(own) or labeler.is_blank(labels):  # what only fills gives way
                axes[axis], own = (labels, own) if labeler.is_blank(own) else (own, labels)
                labeler.freeze(own, "is merged with channels")
            else:
                for one in (own, labels):
                    labeler.freeze(one, "two labelled axes are merged into one")
        elif axis == -1:
            labeler.freeze(labels, "is picked alone from a split of channels")
        else:
            axes[axis] = labels
    return replace(value, axes=axes, grids=())


def _choose(grid: Grid, labeler: Labeler, allowed: Collection[int] | None) -> None:
    split = grid.split
    roots = {root: axis for axis, root in zip(grid.axes, grid.roots, strict=True) if root not in split.fixed}
    if not roots:
        labeler.freeze(split.labels, "lies along axes whose size is computed at run time")
        split.chosen = -1
        return
    fit = {root: axis for root, axis in roots.items() if axis > 0 and (allowed is None or axis in allowed)} or roots
    split.chosen = max(fit, key=lambda root: (_classes(split.labels, root), -root))
    rows = np.moveaxis(split.labels, split.chosen, 0).reshape(split.labels.shape[split.chosen], -1)
    pairs = np.unique(np.stack([np.broadcast_to(rows[:, :1], rows.shape).reshape(-1), rows.reshape(-1)]), axis=1)
    labeler.tie(pairs[0], pairs[1])


def _classes(labels: IntArray, axis: int) -> int:
    """How many kinds of position an axis would keep apart if its labels were tied along all others."""
    return len(np.unique(labels.min(axis=tuple(a for a in range(labels.ndim) if a != axis))))


def _labels_of(grid: Grid) -> tuple[int, IntArray] | None:
    """The axis of the value along which the chosen one runs, and its labels; axis -1 where a single slice of it is left."""
    split = grid.split
    chosen = split.chosen
    if chosen is None or chosen < 0:
        return None
    first = np.moveaxis(split.labels, chosen, 0).reshape(split.labels.shape[chosen], -1)[:, 0]
    coordinates = np.unravel_index(grid.positions, split.labels.shape)[chosen]
    if chosen not in grid.roots:
        return -1, first[np.unique(coordinates)]
    k = grid.roots.index(chosen)
    along = np.moveaxis(coordinates, k, 0).reshape(coordinates.shape[k], -1)[:, 0]
    return grid.axes[k], first[along]

"""The units of one layer, input channels and singular values, and the order in which CC removes them (Li et al., CVPR 2021).

W is the layer's weight as a matrix (outputs, inputs * kernel), H the information of each of its elements: the squared gradient of
the loss. Replacing W by W^ loses, by a Taylor expansion of first order, squared element by element,

    l(W^) = sum H (W^ - W)².

A unit k is scored by what is lost without it, and by what is lost if one more unit went, averaged over those that are left (a
look-ahead over the remaining compression space; D = W_k - W, n units are left before k goes):

    backward = sum H D²
    forward  = backward - 4/(n-1) sum H D W_k + 1/(n-1) [sum H W_k² + sum H (U² S² V'²)]
    score    = backward + gamma forward

The released code computes an SVD for every candidate. Here the scores of all units come from one SVD of the current matrix:
with E_r = s_r u_r v_r',  sum H D E_r = s_r u_r'(H D)v_r and sum H E_r² = s_r² (u_r²)' H v_r²; channels are partial sums. For a
channel the SVD of W_k is taken to be that of the current matrix on the other columns (exact for the other three sums). Scores
are computed in float32, matrices and losses in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """What is left of a layer.

    Attributes:
        kept: Input channels that stay.
        rank: Singular values that stay, where that is cheaper than the plain matrix; None for the plain one.
        loss: Estimated: l(W^).
        elements: Of the weights; the MACs per position.
    """

    kept: tuple[int, ...]
    rank: int | None
    loss: float
    elements: int


@dataclass(frozen=True)
class Layer:
    """A layer as CC sees it.

    Attributes:
        weight: (outputs, inputs, kernel).
        information: H, of the same shape, not negative.
        removable: Mask over inputs: which of them may go.
        ranks: Whether singular values may go.
    """

    weight: Array
    information: Array
    removable: NDArray[np.bool_]
    ranks: bool

    @property
    def full(self) -> int:
        """Singular values; the released code says min(outputs, inputs * kernel height)."""
        return min(len(self.weight), int(self.weight[0].size))

    @property
    def elements(self) -> int:
        """Of the weight."""
        return int(self.weight.size)

    def lost(self, matrix: Array) -> float:
        """l(W^) of a matrix (outputs, inputs * kernel)."""
        return float((self.information.reshape(matrix.shape) * (matrix - self.weight.reshape(matrix.shape)) ** 2).sum())

    def state(self, alive: NDArray[np.bool_], rank: int, loss: float) -> State:
        """With the cheaper of the two ways to write it."""
        outputs, _, kernel = self.weight.shape
        columns = int(alive.sum()) * kernel
        dense, factored = columns * outputs, rank * (columns + outputs)
        cheaper = rank < self.full and factored < dense
        kept = tuple(np.flatnonzero(alive).tolist())
        return State(kept, rank if cheaper else None, loss, min(dense, factored) if cheaper else dense)


def removal_path(layer: Layer, gamma: float = 0.9, share: float = 0.01, most: float = 0.95) -> list[State]:
    """States of a layer from the whole one down, a share of the units removed at each step, scores computed anew every time.

    Args:
        layer: The layer.
        gamma: Weight of the look-ahead; 0.9 as published.
        share: Of all units, removed per step (at least one).
        most: Stops where this share of the layer's MACs is saved.
    """
    current = _Current(layer)
    step = max(1, int(share * (layer.weight.shape[1] + layer.full)))
    path = [layer.state(current.alive, current.rank, 0.0)]
    while path[-1].elements > (1 - most) * layer.elements:
        channels, values = current.scores(gamma)
        order = _lowest(channels, values, step)
        if not order:
            break
        current.remove([k for kind, k in order if kind == "channel"], [k for kind, k in order if kind == "value"])
        path.append(layer.state(current.alive, current.rank, current.lost))
    return path


def sorted_path(layer: Layer, share: float = 0.01, most: float = 0.95) -> list[State]:
    """States where units go in the order of the loss of each alone, scored once: what CC's sensitivity curves are drawn from."""
    current = _Current(layer)
    channels, values = current.alone()
    step = max(1, int(share * (layer.weight.shape[1] + layer.full)))
    order = _lowest(channels, values, len(channels) + len(values))
    values_left = list(range(layer.full))  # the matrix loses components: the others move up in its SVD
    path = [layer.state(current.alive, current.rank, 0.0)]
    for start in range(0, len(order), step):
        chosen = order[start : start + step]
        here = [k for kind, k in chosen if kind == "channel" and current.alive[k] and current.alive.sum() > 1]
        gone = [k for kind, k in chosen if kind == "value"][: len(values_left) - 1]
        current.remove(here, [values_left.index(k) for k in gone])
        values_left = [k for k in values_left if k not in gone]
        path.append(layer.state(current.alive, current.rank, current.lost))
        if path[-1].elements <= (1 - most) * layer.elements:
            break
    return path


def _lowest(channels: Array, values: Array, count: int) -> list[tuple[str, int]]:
    """The units with the lowest scores; infinite ones must not go."""
    scores = np.concatenate([channels, values])
    order = np.argsort(scores, kind="stable")[:count]
    units = [
        ("channel", int(k)) if k < len(channels) else ("value", int(k) - len(channels)) for k in order if np.isfinite(scores[k])
    ]
    left = {"channel": len(channels), "value": len(values)}
    return [unit for unit in units if left[unit[0]] > 0]


class _Current:
    """The matrix as it is after some removals."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        outputs, inputs, kernel = layer.weight.shape
        self._kernel = kernel
        self._original = layer.weight.reshape(outputs, -1)
        self._information = layer.information.reshape(outputs, -1)
        self._matrix = self._original.copy()  # a copy: the original is what everything is compared with
        self.alive = np.ones(inputs, dtype=bool)
        self.rank = layer.full
        self._factors: tuple[Array, Array, Array] | None = None

    @property
    def lost(self) -> float:
        """L of the matrix as it is."""
        return self._layer.lost(self._matrix)

    def remove(self, channels: list[int], values: list[int]) -> None:
        """Set channels to zero and take singular components off; the last of each kind stays."""
        u, s, v = self._svd
        values = [k for k in values if k < len(s)][: max(self.rank - 1, 0)]
        if values:
            self._matrix = self._matrix - (u[:, values] * s[values]) @ v[values]
            self.rank -= len(values)
        for k in channels:
            if self.alive.sum() > 1:
                self.alive[k] = False
        self._matrix[:, np.repeat(~self.alive, self._kernel)] = 0.0
        self._factors = None

    @property
    def _svd(self) -> tuple[Array, Array, Array]:
        """Of the matrix as it is."""
        if self._factors is None:
            self._factors = _svd(self._matrix, self.rank)
        return self._factors

    def alone(self) -> tuple[Array, Array]:
        """What is lost without each channel and each singular value of the whole matrix."""
        h, w = self._information, self._original
        channels = self._by_channel((h * w**2).sum(0))
        u, s, v = self._svd
        values = s**2 * ((u**2).T @ h * v**2).sum(1)
        return self._allowed(channels, values)

    def scores(self, gamma: float) -> tuple[Array, Array]:
        """Of every channel and every singular value; infinite for what must not go."""
        h, w, original = (m.astype(np.float32) for m in (self._information, self._matrix, self._original))
        u, s, v = (m.astype(np.float32) for m in self._svd)
        left = max(int(self.alive.sum()) + self.rank - 1, 1)
        d = w - original
        hd, hw = h * d, h * w
        with_d, with_w = (s * ((u.T @ m) * v).sum(1) for m in (hd, hw))  # sum H D E_r, sum H W E_r
        spread = s**2 * ((u**2).T @ h * v**2).sum(1)  # sum H E_r²
        of_value = {  # by singular value: what changes in each sum when it goes
            "dd": -2 * with_d + spread,
            "dw": -with_d - with_w + spread,
            "ww": -2 * with_w + spread,
            "ss": -spread,
        }
        squares = (h * ((u**2 * s**2) @ v**2)).sum(0)
        columns = {"dd": (hd * d).sum(0), "dw": (hd * w).sum(0), "ww": (hw * w).sum(0), "ss": squares}
        totals = {name: float(own.sum(dtype=np.float64)) for name, own in columns.items()}
        of_channel = {name: -self._by_channel(own) for name, own in columns.items()}
        of_channel["dd"] = of_channel["dd"] + self._by_channel((h * original**2).sum(0))

        def score(change: dict[str, Array]) -> Array:
            dd, dw, ww, ss = (totals[name] + change[name].astype(np.float64) for name in ("dd", "dw", "ww", "ss"))
            forward = dd - 4 / left * dw + (ww + ss) / left
            return np.asarray(dd + gamma * forward)

        return self._allowed(score(of_channel), score(of_value))

    def _by_channel(self, columns: Array) -> Array:
        return np.asarray(columns.reshape(-1, self._kernel).sum(1))

    def _allowed(self, channels: Array, values: Array) -> tuple[Array, Array]:
        stays = ~(self._layer.removable & self.alive) | (self.alive.sum() <= 1)
        none = not self._layer.ranks or self.rank <= 1
        return np.where(stays, np.inf, channels), np.where(none, np.inf, values)


def _svd(matrix: Array, rank: int) -> tuple[Array, Array, Array]:
    """The first singular values, by the eigenvectors of the smaller Gram matrix: several times faster than an SVD.

    Values below 1e-7 of the largest are not exact; they are the first to go in any case.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    values, vectors = np.linalg.eigh(gram)
    s = np.sqrt(values[::-1][:rank].clip(0))
    own = vectors[:, ::-1][:, :rank]
    inverse = np.divide(1.0, s, out=np.zeros_like(s), where=s > 1e-12 * max(s[0], 1e-300))
    if wide:
        return own, s, (own.T @ matrix) * inverse[:, None]
    return (matrix @ own) * inverse, s, own.T


def cheapest_first(path: list[State]) -> Iterator[State]:
    """The states of a path that cost less than all before them."""
    least = None
    for state in path:
        if least is None or state.elements < least:
            least = state.elements
            yield state

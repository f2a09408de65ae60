"""Compensation-aware ranking: which channels to keep when what goes is made up for by the others.

Greedy forward selection on J(S), the error that is left when a layer is compensated for keeping S (CaP). With Σ the
covariance of the layer's input and R = W Σ, picking the channel t (a few columns) lowers J by

    || R_t L^-T ||²     where L Lᵀ = T_tt

after which everything that t explains is taken out (Schur complement), T -= T_:t T_tt^-1 T_t: and R -= R_t T_tt^-1 T_t:.
One pass gives the order and the whole loss curve. For a channel group that several layers read, the losses of all of
them are added up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RIDGE = 1e-9  # of the mean variance: what is left of a channel that the others explain is rounding, not worth a pick


@dataclass(frozen=True)
class Reading:
    """How one layer, or one block of a grouped one, reads a group.

    Attributes:
        covariance: Of everything it reads, (features, features), float64.
        matrix: Its weights, rows scaled by how much an error of that output counts, (outputs, features).
        columns: (units, columns per unit): the features that belong to each unit; -1 where a unit has fewer.
        cross: Cov(y, x) of the target, its rows scaled likewise, where that is not what the layer itself gives
            (`matrix @ covariance`); the loss is then counted from what the features can tell of the target.
    """

    covariance: Tensor
    matrix: Tensor
    columns: Tensor
    cross: Tensor | None = None


@dataclass(frozen=True)
class Ranking:
    """The units of a group, best first.

    Attributes:
        order: (units,): in the order of being picked.
        loss: (units + 1,): `loss[k]` is J when the first k are kept and every reader is compensated.
    """

    order: NDArray[np.int64]
    loss: NDArray[np.float64]

    @property
    def scores(self) -> NDArray[np.float64]:
        """Per unit; the order as scores, higher = keep."""
        scores = np.empty(len(self.order))
        scores[self.order] = np.arange(len(self.order), 0, -1)
        return scores


def rank(readings: Sequence[Reading], units: int) -> Ranking:
    """Rank the units of a group.

    Args:
        readings: How its readers read it; without any, the order is the units' own and nothing is lost.
        units: How many there are.
    """
    states = [_State(reading) for reading in readings]
    left = torch.ones(units, dtype=torch.bool)
    total = sum(state.remaining() for state in states)
    order, loss = [], [total]
    each = [state.gains() for state in states]
    for _ in range(units):
        gains = torch.zeros(units, dtype=torch.float64)
        for state, own in zip(states, each, strict=True):
            gains[state.units] += own
        gains[~left] = -1
        chosen = int(gains.argmax())
        left[chosen] = False
        for k, state in enumerate(states):
            if state.pick(chosen):
                each[k] = state.gains()
        order.append(chosen)
        loss.append(loss[-1] - max(float(gains[chosen]), 0.0))
    # rounding: the curve falls to zero, where every channel is kept
    curve = np.maximum(np.array(loss) - loss[-1], 0.0)
    return Ranking(np.array(order, dtype=np.int64), curve)


class _State:
    """T and R of one reading, down-dated with every pick."""

    def __init__(self, reading: Reading) -> None:
        covariance = reading.covariance
        count = len(covariance)
        floor = _RIDGE * float(covariance.diagonal().mean().clamp_min(1e-30))
        # one more feature that nothing varies with, for units that have fewer columns than others
        self._t = covariance.new_zeros(count + 1, count + 1)
        self._t[:count, :count] = covariance
        self._r = covariance.new_zeros(len(reading.matrix), count + 1)
        self._r[:, :count] = reading.matrix @ covariance if reading.cross is None else reading.cross
        self._t.diagonal().add_(floor)
        self.units = (reading.columns >= 0).any(1).nonzero()[:, 0]  # that it reads at all
        columns = reading.columns[self.units]
        self._columns = torch.where(columns < 0, count, columns).to(covariance.device)
        absent = self._columns == count
        self._absent = (absent[:, :, None] | absent[:, None, :]) if bool(absent.any()) else None
        self._floor = floor
        self._matrix = reading.matrix
        others = torch.ones(count, dtype=torch.bool, device=covariance.device)
        others[self._columns[self._columns < count]] = False
        if bool(others.any()):  # what it reads besides this group always stays
            self._take_out(others.nonzero()[:, 0])

    def remaining(self) -> float:
        """J if nothing more were picked: what is left of the variance of W x."""
        return float((self._r[:, :-1] * self._matrix).sum())

    def gains(self) -> Tensor:
        """By how much picking each of `units` lowers J."""
        if not len(self.units):
            return torch.zeros(0, dtype=torch.float64)
        if self._columns.shape[1] == 1:
            index = self._columns[:, 0]
            return (self._r[:, index].square().sum(0) / self._t.diagonal()[index]).cpu()
        block = self._t[self._columns[:, :, None], self._columns[:, None, :]]
        if self._absent is not None:
            block = torch.where(
                self._absent, self._floor * torch.eye(block.shape[1], dtype=block.dtype, device=block.device), block
            )
        factor, info = torch.linalg.cholesky_ex(block)
        rows = self._r[:, self._columns].permute(1, 2, 0)  # (units, columns, outputs)
        found = torch.linalg.solve_triangular(factor, rows, upper=False).square().sum((1, 2))
        return torch.where((info == 0) & found.isfinite(), found, 0.0).cpu()

    def pick(self, unit: int) -> bool:
        """Take a unit out, where it is read; whether it is."""
        here = self.units != unit
        if bool(here.all()):
            return False
        index = self._columns[~here][0]
        self._take_out(index[index < len(self._t) - 1])
        self.units, self._columns = self.units[here], self._columns[here.to(self._columns.device)]
        self._absent = self._absent[here.to(self._absent.device)] if self._absent is not None else None
        return True

    def _take_out(self, index: Tensor) -> None:
        factor, info = torch.linalg.cholesky_ex(self._t[index][:, index])
        if int(info):
            return  # nothing but rounding is left of it
        share = torch.cholesky_solve(self._t[index], factor)
        self._r -= self._r[:, index] @ share
        self._t -= self._t[:, index] @ share
        self._t[index, index] = self._t[index, index].clamp_min(torch.finfo(torch.float64).tiny)

"""`Moments` and `Targets`: means and covariances of samples that come in parts, in float64 and in one pass."""

import torch
from torch import Tensor


class Moments:
    """Moments of features, and where given of targets with them, one set per block.

    Samples are shifted by the mean of the first part before they are squared and summed: a variance that is small
    beside the squared mean then loses no digits, and a constant feature has a variance of exactly zero.

    Args:
        chunk: How many numbers are turned into float64 at a time.
    """

    def __init__(self, chunk: int = 1 << 23) -> None:
        self._chunk = chunk
        self.count = 0
        self._shifts: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in more samples.

        Args:
            x: (samples, blocks, features).
            y: (samples, blocks, targets), always or never.
        """
        rows = max(self._chunk // (x.shape[1] * x.shape[2]), 1)
        for start in range(0, len(x), rows):
            end = start + rows
            parts = [part[start:end].double().transpose(0, 1) for part in (x, y) if part is not None]
            if not self.count:
                self._begin(parts)
            parts = [part - shift[:, None] for part, shift in zip(parts, self._shifts, strict=True)]
            first = parts[0].transpose(1, 2)
            self._sums = [total + part.sum(1) for total, part in zip(self._sums, parts, strict=True)]
            self._products[0] += first @ parts[0]
            if len(parts) > 1:
                self._products[1] += parts[1].transpose(1, 2) @ parts[0]
                self._products[2] += parts[1].square().sum(1)
            self.count += parts[0].shape[1]

    def _begin(self, parts: list[Tensor]) -> None:
        self._shifts = [part.mean(1) for part in parts]
        self._sums = [torch.zeros_like(shift) for shift in self._shifts]
        x = self._shifts[0]
        self._products = [x.new_zeros(*x.shape, x.shape[1])]
        if len(parts) > 1:
            y = self._shifts[1]
            self._products += [x.new_zeros(*y.shape, x.shape[1]), torch.zeros_like(y)]

    @property
    def mean(self) -> Tensor:
        """E[x], (blocks, features)."""
        return self._shifts[0] + self._sums[0] / self.count

    @property
    def covariance(self) -> Tensor:
        """E[x xᵀ] - E[x] E[x]ᵀ, (blocks, features, features)."""
        rest = self._sums[0] / self.count
        return self._products[0] / self.count - rest[:, :, None] * rest[:, None, :]

    @property
    def target_mean(self) -> Tensor:
        """E[y], (blocks, targets)."""
        return self._shifts[1] + self._sums[1] / self.count

    @property
    def target_variance(self) -> Tensor:
        """Per target, (blocks, targets)."""
        return self._products[2] / self.count - (self._sums[1] / self.count).square()

    @property
    def cross(self) -> Tensor:
        """E[y xᵀ] - E[y] E[x]ᵀ, (blocks, targets, features)."""
        rest, own = self._sums[0] / self.count, self._sums[1] / self.count
        return self._products[1] / self.count - own[:, :, None] * rest[:, None, :]


class Targets:
    """Moments of targets with features whose own moments are known.

    Args:
        mean: E[x], (blocks, features).
    """

    def __init__(self, mean: Tensor) -> None:
        self._features = mean[:, None]
        self.count = 0
        self._shift = self._sum = self._squares = self._product = torch.zeros(0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in more samples: x (samples, blocks, features) and y (samples, blocks, targets), float64."""
        features, targets = x.transpose(0, 1) - self._features, y.transpose(0, 1)
        if not self.count:
            self._shift = targets.mean(1)
            self._sum, self._squares = torch.zeros_like(self._shift), torch.zeros_like(self._shift)
            self._product = targets.new_zeros(*self._shift.shape, x.shape[2])
        targets = targets - self._shift[:, None]
        self._sum, self._squares = self._sum + targets.sum(1), self._squares + targets.square().sum(1)
        self._product += targets.transpose(1, 2) @ features
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """E[y], (blocks, targets)."""
        return self._shift + self._sum / self.count

    @property
    def variance(self) -> Tensor:
        """Per target, (blocks, targets)."""
        return self._squares / self.count - (self._sum / self.count).square()

    @property
    def cross(self) -> Tensor:
        """E[y xᵀ] - E[y] E[x]ᵀ, (blocks, targets, features); the mean of x is that of all samples."""
        return self._product / self.count

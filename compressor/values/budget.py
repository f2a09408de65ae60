"""`Budget`: what the compressed network may cost, or what it may lose."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from compressor.errors import BudgetError

Bound: TypeAlias = float | str

_UNITS: dict[str, dict[str, float]] = {
    "latency": {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    "params": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "memory": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
}
FRONT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the original that a front asks for."""

_EXAMPLES = {"latency": "'2 ms'", "macs": "'60M'", "params": "'400k'", "memory": "'1.5 MB'"}


@dataclass(frozen=True)
class Budget:
    """Upper bounds on a network's costs; several at once must all hold.

    A number is a fraction of the original network, above 0 and at most 1. A text is absolute and carries
    its unit: `"2 ms"` (ns, us, ms, s), `"60M"` MACs or parameters (k, M, G), `"1.5 MB"` (kB, MB, KiB, MiB, …).
    One bound may be a list: a family of networks, one for each value.

    Instead, the network may be looked for by what it loses: `Budget(drop=1.0)` asks for the fastest one that is at most one point
    less accurate on the hold-out than the original, after repair and fine-tuning. `Budget(front="latency")` asks for all of them:
    one network for every tenth of the original's latency, as far down as that can be met.

    Attributes:
        latency: Measured latency of the whole engine on the target, for one batch.
        macs: Multiply-accumulates for one sample.
        params: Elements of all parameters.
        memory: Bytes of all parameters and buffers.
        drop: How much of the metric may be lost, in its unit (points); other bounds but that of latency then hold besides.
        front: What a front is over: `latency`, `macs`, `params` or `memory`.

    Raises:
        BudgetError: A bound is not of that form, or there is none.
    """

    latency: Bound | Sequence[Bound] | None = None
    macs: Bound | Sequence[Bound] | None = None
    params: Bound | Sequence[Bound] | None = None
    memory: Bound | Sequence[Bound] | None = None
    drop: float | None = None
    front: str | None = None

    def __post_init__(self) -> None:
        """Check every bound."""
        given = self._given
        if not given:
            raise BudgetError("a budget needs at least one of latency, macs, params, memory, drop and front")
        self._check_goal()
        lists = [name for name, value in given.items() if isinstance(value, Sequence) and not isinstance(value, str)]
        if len(lists) > 1:
            raise BudgetError(f"budget {lists[0]} and {lists[1]} are lists; only one bound may be, for a family of networks")
        for name in lists:
            object.__setattr__(self, name, tuple(given[name]))
            if not given[name]:
                raise BudgetError(f"budget {name}=[]: an empty list asks for nothing")
        for name, value in given.items():
            for bound in value if name in lists else (value,):
                if name in _UNITS:
                    _check(name, bound)

    def _check_goal(self) -> None:
        given = self._given
        if self.front is not None and (self.front not in _UNITS or len(given) > 1):
            raise BudgetError(f"budget front={self.front!r}: a front is over one of {', '.join(_UNITS)}, without another bound")
        if self.drop is None:
            return
        if isinstance(self.drop, bool) or not isinstance(self.drop, int | float) or not 0 <= self.drop < 100:
            raise BudgetError(f"budget drop={self.drop!r}: write the points of accuracy that may be lost, such as 1.0")
        if self.latency is not None or any(isinstance(value, Sequence) and not isinstance(value, str) for value in given.values()):
            raise BudgetError(f"budget drop={self.drop}: the latency is what is looked for; other bounds are single ones")

    @property
    def members(self) -> tuple["Budget", ...]:
        """One budget for every network of a family or a front; the budget itself where it asks for one network."""
        if self.front is not None:
            return tuple(replace(self, front=None, **{self.front: share}) for share in FRONT)
        for name, value in vars(self).items():
            if isinstance(value, tuple):
                return tuple(replace(self, **{name: bound}) for bound in value)
        return (self,)

    @property
    def bounds(self) -> dict[str, Bound]:
        """The bounds of costs that are set.

        Raises:
            BudgetError: One is a list, or this is a front: ask the `members`.
        """
        if self.front is not None or any(isinstance(value, tuple) for value in self._given.values()):
            raise BudgetError("this budget is a family; ask its members for their bounds")
        return {name: value for name, value in self._given.items() if name in _UNITS}

    @property
    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def to_dict(self) -> dict[str, object]:
        """The bounds that are set, lists as lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._given.items()}

    def limits(self, original: Mapping[str, float]) -> dict[str, float]:
        """The bounds in numbers: milliseconds, MACs, parameters, bytes.

        Args:
            original: The original's costs by the same names; those of fractions must be there.
        """
        return {
            name: absolute(name, bound) if isinstance(bound, str) else float(bound) * original[name]
            for name, bound in self.bounds.items()
        }


def absolute(name: str, text: str) -> float:
    """A text like `"2 ms"` as a number in the unit of that bound (ms, MACs, parameters, bytes).

    Raises:
        BudgetError: It is not a positive number with a unit of that bound.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    units = _UNITS[name]
    unit = match.group(2).lower() if match else ""
    try:
        value = float(match.group(1)) if match else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0 or unit not in units:
        raise BudgetError(
            f"budget {name}={text!r}: write a positive number with one of the units {', '.join(u or '(none)' for u in units)}, "
            f"such as {_EXAMPLES[name]}, or a fraction of the original such as 0.5"
        )
    return value * units[unit]


def _check(name: str, bound: object) -> None:
    if isinstance(bound, str):
        absolute(name, bound)
        return
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound <= 1:
        raise BudgetError(
            f"budget {name}={bound!r}: a number is a fraction of the original and must be above 0 and at most 1; "
            f"write an absolute value with its unit, such as {_EXAMPLES[name]}"
        )

"""What a search may afford: exact costs, and latency by a model that learns from the engines of its leaders."""

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from compressor.errors import BackendError, BudgetError
from compressor.methods.base import Problem
from compressor.methods.structures.paths import AIM, Rows, Widths
from compressor.runtime.latency_model.model import LatencyModel, Observation
from compressor.runtime.latency_model.training_engines import observe, train_latency_model
from compressor.values.plan import Structure

logger = logging.getLogger(__name__)

_FEW, _LAST, _MOST = 2, 3, 1.25  # leaders that tell something, those that count, and the largest correction


class Affordable:
    """Which structures are within the limits of a problem.

    Args:
        problem: With the limits.
        options: Legal widths of every group.
        engines: Engines that the latency model is fitted to at first.

    Raises:
        BackendError: There is a limit of latency, and too few engines can be built.
    """

    def __init__(self, problem: Problem, options: Sequence[Sequence[int]], engines: int) -> None:
        self.problem = problem
        self.model: LatencyModel | None = None
        self._off: list[float] = []
        self._narrowest: Rows | None = None
        if "latency" in problem.limits:
            problem.progress.stage(f"latency model: {engines} engines")
            self.model = train_latency_model(
                problem.channels,
                options,
                problem.target,
                engines,
                problem.seed,
                progress=problem.progress,
                observed=problem.observe,
            )
            error = self.model.error
            logger.info("latency model: off by %.1f %% (median), %.1f %% (p90)", 100 * error.median, 100 * error.p90)

    def within(self, rows: Rows) -> NDArray[np.bool_]:
        """(structures,) from (structures, groups).

        The narrowest one, once it was found to be within the limits, stays within them, whatever the latency model learns: a search
        needs somewhere to go, and what is built in the end is measured.
        """
        good = np.ones(len(rows), dtype=bool)
        for name, found in self.costs(rows).items():
            good &= found <= self.problem.limits[name] * (AIM if name == "latency" else 1.0)
        if self._narrowest is not None:
            good |= (rows == self._narrowest).all(axis=1)
        return good

    def check(self, smallest: Rows) -> None:
        """Raise `BudgetError` where not even the smallest structure that may be asked for, (1, groups), is within the limits.

        A latency that the model takes to be out of reach is measured before that is said.

        Raises:
            BudgetError: What exceeds its limit is said.
            BackendError: The smallest has to be measured, and its engine cannot be built.
        """
        limits = self.problem.limits
        costs = {name: float(found[0]) for name, found in self.costs(smallest).items()}
        over = [name for name, cost in costs.items() if cost > limits[name] * (AIM if name == "latency" else 1.0)]
        if over == ["latency"]:
            order = {group.name: np.arange(group.size, dtype=float) for group in self.problem.channels.groups}
            costs["latency"] = self.problem.measure(Widths(self.problem, order).plan(smallest[0])).ratio
            over = over if costs["latency"] > limits["latency"] else []
        elif "latency" in over:
            over.remove("latency")  # predicted only, and it cannot be met anyway
        if over:
            found, asked = (", ".join(f"{name} {own[name]:,.3g}" for name in over) for own in (costs, limits))
            raise BudgetError(f"the budget cannot be met: the smallest legal network has {found} (asked: {asked})")
        self._narrowest = smallest[0]

    def costs(self, rows: Rows) -> dict[str, NDArray[np.float64]]:
        """Those costs of structures that have a limit; latency as a share of the original's."""
        limits, channels = self.problem.limits, self.problem.channels
        found: dict[str, NDArray[np.float64]] = {}
        if "params" in limits or "memory" in limits:
            costs = channels.costs(rows)
            found = {
                "macs": costs.macs.astype(float),
                "params": costs.params.astype(float),
                "memory": costs.memory_bytes.astype(float),
            }
        elif "macs" in limits:
            found = {"macs": channels.costs.macs(rows).astype(float)}
        if self.model is not None:
            found["latency"] = self.model.predict(rows) / self.model.reference_ms * self.correction
        return {name: values for name, values in found.items() if name in limits}

    @property
    def correction(self) -> float:
        """What latencies of leaders turned out to be of those predicted: the median of the last few.

        A search ends up where the model is too hopeful; a table that has seen one more engine is so elsewhere.
        """
        if len(self._off) < _FEW:
            return 1.0
        return float(np.clip(np.median(self._off[-_LAST:]), 1 / _MOST, _MOST))

    def price(self, rows: Rows) -> NDArray[np.float64]:
        """What channels are removed to save, (structures,): latency where that is limited, else MACs."""
        if self.model is not None:
            return self.model.predict(rows)
        return np.asarray(self.problem.channels.costs.macs(rows), dtype=np.float64)

    def measured(self, structure: Structure) -> dict[str, object] | None:
        """Build and measure a leader; as plain data, or None where its engine cannot be built."""
        assert self.model is not None
        problem, anchor = self.problem, self.model.reference_ms
        if problem.observe is not None:
            found = problem.observe([structure], anchor)
        else:
            found = list(observe(problem.channels, [structure], problem.target, anchor_ms=anchor))
        if not found:
            return None
        own = found[0]
        off = self.model(structure) / own.median_ms - 1
        logger.info(
            "a leader takes %.3f of the original; the model was off by %+.1f %%", own.median_ms / own.reference_ms, 100 * off
        )
        return {
            "widths": dict(structure.widths), "ranks": dict(structure.ranks), "removed": list(structure.removed),
            "median_ms": own.median_ms, "reference_ms": own.reference_ms,
            "blocks_ms": [list(pair) for pair in own.blocks_ms],
        }  # fmt: skip

    def learn(self, record: Mapping[str, object]) -> None:
        """Let the model know of a leader that was `measured`."""
        if self.model is None:
            return
        blocks = tuple((str(name), float(ms)) for name, ms in cast(list[tuple[str, float]], record["blocks_ms"]))
        widths, ranks = (tuple(cast(Mapping[str, int], record.get(name, {})).items()) for name in ("widths", "ranks"))
        structure = Structure(widths, ranks, (), tuple(cast(Sequence[str], record.get("removed", ()))))
        median, reference = (float(cast(float, record[name])) for name in ("median_ms", "reference_ms"))
        anchor = self.model.reference_ms  # who measured it may be another process, to whom the original took another time
        blocks = tuple((name, ms * anchor / reference) for name, ms in blocks)
        median, reference = median * anchor / reference, anchor
        self._off.append(median / self.model(structure))
        try:
            self.model = self.model.observed(Observation(structure, median, reference, blocks))
        except BackendError as error:
            logger.warning("the latency model did not take a leader: %s", error)

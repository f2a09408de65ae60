"""Walking down a path to a measured latency, some of whose engines cannot be built."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from compressor.errors import BackendError
from compressor.methods.structures.paths import AIM, Widths, fitting


def path_of(problem, steps=40):
    """All free groups at once, a little narrower at each step."""
    sizes = np.array([group.size for group in problem.channels.groups])
    free = np.array([group.frozen is None for group in problem.channels.groups])
    rows = [np.where(free, np.maximum(np.ceil(sizes * (1 - k / steps)), 1), sizes) for k in range(steps)]
    return np.unique(np.stack(rows).astype(np.int64), axis=0)[::-1]


def space_of(problem, broken):
    """Latency falls with the MACs; engines between two shares of them cannot be built."""
    full = float(problem.channels.costs_of(problem.channels.full).macs[0])
    built = []

    def measure(plan):
        share = float(problem.channels.costs_of(problem.channels.structure(plan)).macs[0]) / full
        if broken[0] <= share <= broken[1]:
            raise BackendError("out of memory")
        built.append(share)
        return SimpleNamespace(ratio=0.2 + 0.8 * share)

    scores = {group.name: np.arange(group.size, dtype=float) for group in problem.channels.groups}
    return Widths(replace(problem, limits={"latency": 0.6}, measure=measure), scores), built


@pytest.mark.parametrize("broken", [(2.0, 3.0), (0.55, 0.95), (0.4, 0.6)])
def test_an_engine_that_cannot_be_built_is_left_out(problem, broken):
    space, built = space_of(problem, broken)
    plan = fitting(space, path_of(problem))
    full = float(problem.channels.costs_of(problem.channels.full).macs[0])
    share = float(problem.channels.costs_of(problem.channels.structure(plan)).macs[0]) / full
    assert share in built, "what is returned was measured"
    assert 0.2 + 0.8 * share <= 0.6
    assert share > (0.25 if broken[0] < 0.5 else 0.4), "and nothing wider was to be had"


@pytest.mark.parametrize(("latency", "binds"), [(0.9, "macs"), (0.6, "latency")])
def test_whichever_of_two_limits_binds_is_used_up(problem, latency, binds):
    """A latency that a network far within the MACs asked for meets must not keep it there."""
    space, built = space_of(problem, (2.0, 3.0))
    full = float(problem.channels.costs_of(problem.channels.full).macs[0])
    space.problem = replace(space.problem, limits={"latency": latency, "macs": 0.55 * full})
    path = path_of(problem, 5)  # coarse: what is within both leaves much of them
    share = float(problem.channels.costs_of(problem.channels.structure(fitting(space, path))).macs[0]) / full
    plain = float(problem.channels.costs_of(problem.channels.structure(fitting(space, path, fill=False))).macs[0]) / full
    assert plain < share <= 0.55
    assert share in built
    assert 0.2 + 0.8 * share <= latency
    if binds == "macs":
        space.problem = replace(space.problem, limits={"macs": 0.55 * full})
        assert share == float(problem.channels.costs_of(problem.channels.structure(fitting(space, path))).macs[0]) / full


def test_what_meets_the_other_limit_but_not_what_the_latency_is_aimed_at_is_narrowed_further(problem):
    """Measured again it may be a little slower; and a budget of the original's own latency asks for nothing."""
    space, _ = space_of(problem, (2.0, 3.0))
    full, path = float(problem.channels.costs_of(problem.channels.full).macs[0]), path_of(problem)
    space.problem = replace(space.problem, limits={"macs": 0.55 * full, "latency": 1.0})
    share = float(problem.channels.costs_of(problem.channels.structure(fitting(space, path, fill=False))).macs[0]) / full
    space.problem = replace(space.problem, limits={"macs": 0.55 * full, "latency": (0.2 + 0.8 * share) / 0.995})
    narrower = float(problem.channels.costs_of(problem.channels.structure(fitting(space, path))).macs[0]) / full
    assert 0.2 + 0.8 * narrower <= AIM * space.problem.limits["latency"]
    space.problem = replace(space.problem, limits={"latency": 1.0})
    assert not fitting(space, path).kept


def test_where_not_even_the_narrowest_can_be_built_the_reason_is_said(problem):
    space, _ = space_of(problem, (0.0, 0.9))
    with pytest.raises(BackendError, match="out of memory"):
        fitting(space, path_of(problem))

"""Optuna's own conformance suite for samplers, over both of ours."""

from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase

from compressor.search.samplers import AACPSampler, LeGRSampler

# Left out: MultiObjectiveSamplerTestCase, because both algorithms order candidates by one value (SingleOnlySamplerTestCase checks
# that they say so).


class _Cases(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    pass


class TestLeGRSampler(_Cases):
    @pytest.fixture(params=[{}, {"population": 4, "samples": 2}, {"lag": 3}], ids=["published", "small", "lag"])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: LeGRSampler(seed=0, **request.param)


class TestAACPSampler(_Cases):
    @pytest.fixture(params=[{}, {"population": 4, "max_stay": 1}, {"lag": 3}], ids=["published", "small", "lag"])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: AACPSampler(seed=0, **request.param)

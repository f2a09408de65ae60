"""Layers that read a part of a stream: removed = masked, costs as built, plans as JSON, repaired like any other."""

import pytest
import torch
from torch import nn

import compressor
from compressor import Plan
from compressor.errors import PlanError
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.trace import outputs_of
from compressor.passes.transforms.verify import verify_removal
from tests.networks import Residual, randomize


class Stream(nn.Module):
    """One stream with three readers: a convolution, a transposed one and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.Conv2d(6, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.up(x), self.fc(x.mean((2, 3)))


def prepared(model):
    graph = compressor.trace(randomize(model), (torch.zeros(1, 3, 8, 8),)).eval()
    return graph, compressor.analyze(graph)


PLANS = {
    "one reader": Plan.keep({}, reads={"inner": [0, 3, 4]}),
    "every reader": Plan.keep({}, reads={"inner": [0, 3, 4], "up": [1, 2], "fc": [0, 7]}),
    "beside removal": Plan.keep({"inner": [0, 2], "stem": [0, 1, 3, 4, 6]}, reads={"inner": [0, 2, 3, 4, 5], "fc": [1, 3]}),
    "all that stays": Plan.keep({"stem": [0, 1]}, reads={"inner": [0, 1, 2]}),
}


@pytest.mark.parametrize("name", PLANS)
def test_reading_a_part_equals_masking_the_rest(name):
    graph, channels = prepared(Stream())
    plan = PLANS[name]
    small = compressor.apply(plan, graph)
    assert verify_removal(channels, plan, small).relative_error < 1e-5
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        wide = compressor.trace(Stream(), (torch.zeros(1, 3, 8, 8),)).eval()
        assert not torch.allclose(outputs_of(wide(x))[1], outputs_of(small(x))[1])
    costs = channels.costs_of(channels.structure(plan))
    built = sum(p.numel() for p in small.parameters())
    counted = int(costs.params[0])
    assert counted == built if not plan.kept else counted >= built  # counts do not know which of the reads were removed


def test_the_oracle_sees_a_gather_of_the_wrong_channels():
    graph, channels = prepared(Stream())
    right, wrong = (Plan.keep({}, reads={"inner": index}) for index in ([0, 3, 4], [0, 3, 5]))
    with pytest.raises(compressor.PassError, match="removing channels changed the outputs"):
        verify_removal(channels, right, compressor.apply(wrong, graph))


def test_macs_are_those_of_the_narrowed_layers():
    graph, channels = prepared(Stream())
    full = channels.costs_of(channels.full)
    found = channels.costs_of(channels.structure(PLANS["every reader"]))
    spared = 5 * 6 * 9 * 64 + 6 * 4 * 4 * 64 + 6 * 5
    assert int(full.macs[0] - found.macs[0]) == spared
    again = compressor.apply(PLANS["every reader"], graph)
    assert int(compressor.analyze(again).costs_of(compressor.analyze(again).full).macs[0]) == int(found.macs[0])


def test_plans_with_reads_travel_as_json_and_others_look_as_before():
    plan = PLANS["beside removal"]
    assert Plan.from_json(plan.to_json()) == plan
    assert "reads" not in Plan.keep({"inner": [0]}).to_json()
    assert Plan.keep({"inner": [0]}).digest != Plan.keep({"inner": [0]}, reads={"fc": [1]}).digest
    _, channels = prepared(Stream())
    structure = channels.structure(plan)
    assert type(structure).from_json(structure.to_json()) == structure
    assert structure.digest != channels.structure(Plan.keep(dict(plan.kept))).digest
    with pytest.raises(PlanError, match="field `reads`"):
        Plan.from_json('{"schema": 1, "model": "", "keep": {}, "reads": 3}')


WRONG = {
    "no such layer": ({"nothing": [0]}, "`nothing` cannot read a part"),
    "beyond the inputs": ({"inner": [8]}, "has 8 input channels, the plan reads channel 8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_that_does_not_fit_is_refused(case):
    reads, message = WRONG[case]
    graph, _ = prepared(Stream())
    with pytest.raises(PlanError, match=message):
        compressor.apply(Plan.keep({}, reads=reads), graph)
    with pytest.raises(PlanError, match="leaves `inner` nothing to read"):
        compressor.apply(Plan.keep({"stem": [0]}, reads={"inner": [1]}), graph)


@pytest.mark.parametrize("features", ["narrowed", "original"])
def test_a_layer_that_reads_a_part_is_repaired(features):
    graph, channels = prepared(Residual(8, 12))
    plan = Plan.keep({}, reads={"conv1": [0, 1, 2, 5]})
    small = compressor.apply(plan, graph).eval()
    x = torch.randn(40, 3, 8, 8)
    settings = Compensation(features=features, positions=64)
    found = Compensate(channels, plan, Calibration(((x,),)), settings).run(small)
    assert found.repairs[0].layer == "conv1"
    with torch.no_grad():
        errors = [float((g(x) - graph(x)).square().sum()) for g in (small, found.graph)]
    assert errors[1] < 0.9 * errors[0]

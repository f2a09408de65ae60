"""Fits through an activation: they ask for what the activation lets through, and are nearer behind it than a plain fit."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.fitting import fit_layers
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.samples import linear_part
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from tests.networks import Net, conv, end, head, randomize

ACTIVATIONS = {
    "relu": (F.relu, (0.0, math.inf)),
    "relu in place": (F.relu_, (0.0, math.inf)),
    "relu6": (F.relu6, (0.0, 6.0)),
    "hardtanh": (F.hardtanh, (-1.0, 1.0)),
    "hardtanh between": (lambda x: F.hardtanh(x, -0.5, 0.25), (-0.5, 0.25)),
    "silu": (F.silu, None),
    "none": (lambda x: x * 2, None),
}


def network(function, width=16):
    torch.manual_seed(0)

    def forward(m, x):
        return end(m, function(m.b(F.relu(m.a(x)))))

    return randomize(Net(forward, a=conv(3, width), b=nn.Sequential(conv(width, 12, bias=False), nn.BatchNorm2d(12)), fc=head(12)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_an_activation_lets_through_is_known(name):
    function, expected = ACTIVATIONS[name]
    graph = compressor.trace(network(function), (torch.randn(1, 3, 8, 8),))
    norm = next(node for node in graph.graph.nodes if str(node.target) == "b.1")
    assert linear_part(norm) == expected


def test_two_readers_of_different_kinds_let_everything_through():
    graph = compressor.trace(network(lambda x: F.relu(x) + 0.1 * x), (torch.randn(1, 3, 8, 8),))
    assert linear_part(next(node for node in graph.graph.nodes if str(node.target) == "b.1")) is None


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh between"])
def test_it_is_nearer_behind_the_activation(name, monkeypatch):
    function, _ = ACTIVATIONS[name]
    model = network(function)
    channels = compressor.analyze(compressor.trace(model, (torch.randn(1, 3, 8, 8),)))
    plan = compressor.Plan.keep({"a": range(6)}, channels.digest)
    images = [torch.randn(64, 3, 8, 8) for _ in range(8)]
    calibration = Calibration.read(images, channels.graph, 512)
    seen = torch.randn(128, 3, 8, 8)

    def error(rounds):
        monkeypatch.setattr(fit_layers, "_ROUNDS", rounds)
        small = compressor.apply(plan, channels.graph).eval()
        fixed = Compensate(channels, plan, calibration, Compensation(ridge=0.0)).run(small).graph
        with torch.no_grad():
            layers = [[m.get_submodule(name) for name in ("a", "b.0", "b.1")] for m in (fixed, model)]
            found, expected = (function(norm(b(F.relu(a(seen))))) for a, b, norm in layers)
        return float((found - expected).square().mean())

    errors = [error(rounds) for rounds in (0, 1, 3)]
    assert errors[2] < errors[1] < errors[0]

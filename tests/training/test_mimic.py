"""Feature mimicking: nearer to the original without a label, never worse than its start, and the same after a kill."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import compressor
from compressor import DataError, Mimic, Plan, Progress
from compressor.passes.statistics.calibration import Calibration
from compressor.training.mimic import features_of, mimic
from tests.networks import Residual, randomize
from tests.training.test_fine_tune import blobs

SETTINGS = Mimic(steps=48, batch=16, learning_rate=3e-3)


@pytest.fixture(scope="module")
def narrowed():
    torch.manual_seed(0)
    graph = compressor.trace(randomize(Residual()).eval(), (torch.randn(2, 3, 8, 8),))
    channels = compressor.analyze(graph)
    images = Calibration.read([torch.stack([x for x, _ in blobs(96)])], graph, 96)
    plan = channels.plan(0.4)
    return channels, plan, images


def outputs(graph, images):
    with torch.no_grad():
        return torch.cat([graph(*batch) for batch in images.batches])


def test_the_outputs_come_nearer_and_batch_norms_stay(narrowed):
    channels, plan, images = narrowed
    graph = compressor.apply(plan, channels.graph).eval()
    before = (outputs(graph, images) - outputs(channels.graph, images)).square().mean()
    norms = {name: buffer.clone() for name, buffer in graph.named_buffers()}
    found = mimic(graph, channels, plan, images, SETTINGS)
    assert found.after < 0.3 * found.before
    assert (outputs(graph, images) - outputs(channels.graph, images)).square().mean() < 0.3 * before
    assert norms
    for name, buffer in graph.named_buffers():
        assert torch.equal(buffer, norms[name]), name


def test_what_it_aims_at_are_the_features_in_front_of_the_pooling_and_only_those_channels_that_are_left(narrowed):
    channels, plan, _ = narrowed
    graph = compressor.apply(plan, channels.graph)
    (original, left, kept), (output, _, none) = features_of(channels, plan, graph)
    nodes = {node.name: node for node in channels.graph.graph.nodes}
    assert "relu" in str(nodes[original].target)
    assert "mean" in {user.name for user in nodes[original].users}
    assert left == original
    assert output == "fc"  # which has to do without the channels that are gone
    assert none is None
    stream = next(group for group in channels.free if "stem" in group.layers)
    assert kept.tolist() == list(dict(plan.kept)[stream.name])
    gone = Plan.keep({}, channels.digest, removed=[channels.branches[0].name])
    ((original, left, kept),) = features_of(channels, gone, compressor.apply(gone, channels.graph))
    assert kept is None
    assert left != original  # the shortcut stands for the sum


def test_it_is_never_worse_than_its_start(narrowed):
    channels, plan, images = narrowed
    graph = compressor.apply(plan, channels.graph).eval()
    state = copy.deepcopy(graph.state_dict())
    found = mimic(graph, channels, plan, images, replace(SETTINGS, steps=8, learning_rate=30.0))
    assert found.after == found.before
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())


class Stop(Progress):
    def __init__(self, at):
        self.at = at

    def tick(self, done, total, text):
        if done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 6, 29, 47])
def test_stopped_anywhere_and_started_again_equals_uninterrupted(narrowed, at, tmp_path):
    channels, plan, images = narrowed
    one, other = (compressor.apply(plan, channels.graph).eval() for _ in range(2))
    mimic(one, channels, plan, images, SETTINGS, seed=3)
    with pytest.raises(KeyboardInterrupt):
        mimic(other, channels, plan, images, SETTINGS, tmp_path / "c.safetensors", 3, Stop(at))
    other = compressor.apply(plan, channels.graph).eval()
    mimic(other, channels, plan, images, SETTINGS, tmp_path / "c.safetensors", 3)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_another_checkpoint_and_a_loss_that_is_no_number_are_said(narrowed, tmp_path):
    channels, plan, images = narrowed
    file = tmp_path / "c.safetensors"
    graph = compressor.apply(plan, channels.graph).eval()
    mimic(graph, channels, plan, images, replace(SETTINGS, steps=2), file)
    with pytest.raises(DataError, match="other settings"):
        mimic(graph, channels, plan, images, SETTINGS, file)
    with torch.no_grad():
        next(iter(graph.parameters())).fill_(float("nan"))
    with pytest.raises(DataError, match="step 1 is not finite"):
        mimic(graph, channels, plan, images, SETTINGS)
    with pytest.raises(DataError, match="steps"):
        Mimic(steps=0)


def test_a_network_of_several_heads_mimics_in_front_of_each(tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.stem(x).relu()
            return {"class": self.a(x.mean((2, 3))), "mask": self.b(torch.sigmoid(x))}

    channels = compressor.analyze(compressor.trace(Heads().eval(), (torch.randn(2, 3, 8, 8),)))
    plan = channels.plan(0.5)
    found = features_of(channels, plan, compressor.apply(plan, channels.graph))
    assert {pair[0] for pair in found} == {"relu", "sigmoid", "a", "b"}
    assert [len(pair[2]) for pair in found if pair[0] in ("relu", "sigmoid")] == [4, 4]


def test_compress_trains_without_labels_and_goes_on_after_a_kill(tmp_path):
    torch.manual_seed(0)
    model, images = randomize(Residual()).eval(), torch.stack([x for x, _ in blobs(160)])
    given = {
        "calibrate": [images], "budget": compressor.Budget(macs=0.5), "method": compressor.CaP(probes=30), "finetune": SETTINGS,
    }  # fmt: skip
    one = compressor.compress(model, (torch.randn(1, 3, 8, 8),), out=tmp_path / "one", **given)
    names = [step.name for step in one.steps]
    assert "features mimicked" in names
    assert max(step.metric for step in one.steps[1:]) == one.steps[-1].metric
    with pytest.raises(KeyboardInterrupt):
        compressor.compress(model, (torch.randn(1, 3, 8, 8),), out=tmp_path / "two", **given, progress=Killed())
    two = compressor.compress(model, (torch.randn(1, 3, 8, 8),), out=tmp_path / "two", **given)
    for name, value in one.graph.state_dict().items():
        assert torch.equal(value, two.graph.state_dict()[name]), name
    with pytest.raises(DataError, match="no images to mimic"):
        compressor.compress(
            model, (torch.randn(1, 3, 8, 8),), validate=[(images, torch.zeros(160).long())], out=tmp_path / "three",
            budget=compressor.Budget(macs=0.5), finetune=SETTINGS,
        )  # fmt: skip


class Killed(Progress):
    def tick(self, done, total, text):
        if "features" in text and done == 30:
            raise KeyboardInterrupt

"""`Compensate` on real little networks: what it promises, against what is measured."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.errors import DataError
from compressor.passes.channels.readers import beyond_repair, readers_of
from compressor.passes.fitting.compensate import Compensate
from compressor.passes.fitting.jobs import jobs_of
from compressor.passes.fitting.settings import Compensation
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import collect
from compressor.passes.statistics.original_outputs import Remembered
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.trace import outputs_of
from compressor.values.files import digest_of_tensors
from compressor.values.plan import Plan
from tests.networks import Residual, randomize
from tests.networks import first_output as outputs
from tests.networks import output_error as error

ALL = 10**6  # every position
SETTINGS = {
    "own": Compensation(positions=ALL),
    "published, not rescaled": Compensation(positions=ALL, features="original"),
}


def images(count=40, size=8, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def calibration(x=None):
    return Calibration(tuple((batch,) for batch in (images() if x is None else x).split(16)))


def prepared(model, size=8):
    graph = compressor.trace(randomize(model), (torch.zeros(1, 3, size, size),)).eval()
    return graph, compressor.analyze(graph)


def narrowed(graph, channels, plan):
    return compressor.apply(plan, graph).eval()


class Plain(nn.Module):
    """Two convolutions; with or without anything between and behind."""

    def __init__(self, second, between=None, behind=None, inner=12):
        super().__init__()
        self.first = nn.Conv2d(3, inner, 3, padding=1)
        self.between = between or nn.ReLU()
        self.second = second
        self.behind = behind or nn.Identity()

    def forward(self, x):
        return self.behind(self.second(self.between(self.first(x))))


READERS = {
    "3x3": lambda: nn.Conv2d(12, 5, 3, padding=1),
    "without a bias": lambda: nn.Conv2d(12, 5, 3, bias=False),
    "1x1": lambda: nn.Conv2d(12, 5, 1),
    "strided": lambda: nn.Conv2d(12, 5, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(12, 5, 3, dilation=2, padding=2),
    "reflected": lambda: nn.Conv2d(12, 5, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(12, 6, 3, padding=1, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(12, 5, 2, stride=2),
    "depthwise, then 1x1": lambda: nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(), nn.Conv2d(12, 5, 1)),
    "linear behind a flatten": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)),
    "with a norm": lambda: nn.Sequential(nn.Conv2d(12, 5, 3, bias=False), nn.BatchNorm2d(5)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("how", SETTINGS)
def test_the_error_of_the_outputs_falls_on_the_images_that_it_was_fitted_on(name, how):
    graph, channels = prepared(Plain(READERS[name]()))
    plan = channels.plan(0.5, seed=1)
    small = narrowed(graph, channels, plan)
    before, state = copy.deepcopy(small.state_dict()), digest_of_tensors(graph.state_dict())
    found = Compensate(channels, plan, calibration(), SETTINGS[how]).run(small)
    x = torch.cat([batch[0] for batch in calibration().batches])
    assert error(graph, found.graph, x) < 0.98 * error(graph, small, x)
    assert all(repair.after <= repair.before + 1e-6 for repair in found.repairs)
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items()), "the argument was changed"
    assert digest_of_tensors(graph.state_dict()) == state


def test_what_is_reported_is_the_error_that_is_measured():
    graph, channels = prepared(Plain(nn.Conv2d(12, 5, 3, padding=1)))
    plan = channels.plan(0.5, seed=1)
    small = narrowed(graph, channels, plan)
    found = Compensate(channels, plan, calibration(), SETTINGS["own"]).run(small)
    expected = outputs(graph, images())
    variance = expected.transpose(0, 1).flatten(1).var(1, correction=0).sum()
    for reported, network in ((found.repairs[0].before, small), (found.repairs[0].after, found.graph)):
        measured = (outputs(network, images()) - expected).square().mean((0, 2, 3)).sum() / variance
        assert reported == pytest.approx(float(measured), rel=1e-4)


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("kind", ["duplicated", "combined", "dead"])
def test_a_redundant_channel_goes_without_a_loss(kind, how):
    model = Residual(8, 12)
    graph, _ = prepared(model)
    with torch.no_grad():
        conv, norm = graph.get_submodule("conv1"), graph.get_submodule("bn1")
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)
        norm.weight.fill_(1.0)
        norm.bias.fill_(20.0)  # so far above zero that the rectifier lets everything through: combinations stay linear
        if kind == "duplicated":
            conv.weight[5] = conv.weight[2]
        elif kind == "combined":
            conv.weight[5] = 0.5 * conv.weight[2] - 2 * conv.weight[7]
        else:
            norm.bias[5] = -100.0
    channels = compressor.analyze(graph)
    plan = Plan.keep({"conv1": [k for k in range(12) if k != 5]})
    small = narrowed(graph, channels, plan)
    found = Compensate(channels, plan, calibration(), SETTINGS[how]).run(small).graph
    assert error(graph, found, images(seed=9)) < 1e-6, "on other images too"
    if kind != "dead":
        assert error(graph, small, images(seed=9)) > 1e-3


@pytest.mark.parametrize("padding", [0, 1])
def test_a_constant_channel_is_folded_into_the_bias_with_padding_respected(padding):
    graph, _ = prepared(Plain(nn.Conv2d(12, 5, 3, padding=padding)))
    with torch.no_grad():
        graph.get_submodule("first").weight[4] = 0.0
        graph.get_submodule("first").bias[4] = 3.0
    channels = compressor.analyze(graph)
    plan = Plan.keep({"first": [k for k in range(12) if k != 4]})
    found = Compensate(channels, plan, calibration(), SETTINGS["own"]).run(narrowed(graph, channels, plan)).graph
    difference = (outputs(found, images(seed=3)) - outputs(graph, images(seed=3))).abs()
    scale = float(outputs(graph, images()).std())
    if padding == 0:
        assert float(difference.max()) < 1e-3 * scale
    else:  # at the border the constant is cut off, which a bias cannot say: the mean over all positions is right
        mean = (outputs(found, images()) - outputs(graph, images())).mean((0, 2, 3)).abs().max()
        assert float(mean) < 1e-4 * scale
        assert float(difference.max()) > 1e-3 * scale


def test_published_is_the_formula_of_the_paper():
    graph, channels = prepared(Plain(nn.Conv2d(12, 5, 3, padding=1)))
    plan = channels.plan(0.5, seed=1)
    found = Compensate(channels, plan, calibration(), Compensation.published(positions=ALL)).run(narrowed(graph, channels, plan))
    statistics = collect(graph, ["second"], calibration(), ALL)["second"].parts[0]
    sigma, mean = statistics.covariance[0], statistics.mean[0]
    patches = F.unfold(torch.relu(graph.get_submodule("first")(images())), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    assert torch.allclose(sigma, torch.cov(patches.T, correction=0), atol=1e-5)
    weight, bias = graph.get_submodule("second").weight.double().flatten(1), graph.get_submodule("second").bias.double()
    index = [9 * k + j for k in dict(plan.kept)["first"] for j in range(9)]
    new = weight @ sigma[:, index] @ torch.linalg.inv(sigma[index][:, index])
    scale = ((weight @ sigma * weight).sum(1) / (new @ sigma[index][:, index] * new).sum(1)).sqrt()
    new = new * scale[:, None]
    module = found.graph.get_submodule("second")
    assert torch.allclose(module.weight.double().flatten(1), new, atol=1e-3)
    assert torch.allclose(module.bias.double(), bias + weight @ mean - new @ mean[index], atol=1e-3)


def deep():
    torch.manual_seed(3)
    return nn.Sequential(
        *[layer for k in range(4) for layer in (nn.Conv2d(3 if k == 0 else 10, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU())],
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5),
    )  # fmt: skip


def test_features_of_the_narrowed_network_keep_errors_from_piling_up():
    graph, channels = prepared(deep())
    plan = channels.plan(0.5, seed=1)
    small = narrowed(graph, channels, plan)
    errors = {}
    for name, settings in SETTINGS.items():
        errors[name] = error(graph, Compensate(channels, plan, calibration(), settings).run(small).graph, images())
    assert errors["own"] < errors["published, not rescaled"] < error(graph, small, images())


def test_a_shortcut_that_has_lost_something_is_made_up_for():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8))
                for _ in range(2)
            )

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return x

    graph, channels = prepared(Two())
    plan = Plan.keep({"blocks.0.0": [0, 1, 2]})  # only the first block is narrowed; the second can make up for it
    small = narrowed(graph, channels, plan)
    found = Compensate(channels, plan, calibration(), SETTINGS["own"]).run(small).graph
    first = copy.deepcopy(small)  # as it is repaired, but for the second block
    first.load_state_dict(dict(found.state_dict()) | {
        k: v for k, v in small.state_dict().items() if k.startswith("blocks.1")
    })  # fmt: skip
    assert error(graph, found, images()) < 0.95 * error(graph, first, images())


def test_several_readers_of_one_stream_are_each_repaired():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 3, padding=1)
            self.left, self.right = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(12, 6, 1)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.left(x), self.right(x)

    graph, channels = prepared(Wide())
    plan = channels.plan(0.5, seed=1)
    small = narrowed(graph, channels, plan)
    found = Compensate(channels, plan, calibration(), SETTINGS["own"]).run(small)
    assert [repair.layer for repair in found.repairs] == ["left", "right"]
    with torch.no_grad():
        triples = zip(graph(images()), small(images()), found.graph(images()), strict=True)
        assert all((c - a).square().sum() < 0.9 * (b - a).square().sum() for a, b, c in triples)


@pytest.mark.parametrize("memory_mb", [1, 64])
def test_an_original_that_is_remembered_shows_what_it_shows_as_it_runs(memory_mb):
    graph, channels = prepared(Residual())
    settings, images = Compensation(positions=10, memory_mb=memory_mb), calibration()
    known = Remembered(channels, images, settings.positions, 3, memory_mb)
    state = digest_of_tensors(graph.state_dict())
    for share in (0.5, 0.25):  # one memory for several networks
        plan = channels.plan(share, seed=1)
        small = narrowed(graph, channels, plan)
        running, remembered = (Compensate(channels, plan, images, settings, 3, original).run(small) for original in (None, known))
        assert running.repairs == remembered.repairs
        assert digest_of_tensors(running.graph.state_dict()) == digest_of_tensors(remembered.graph.state_dict())
    assert digest_of_tensors(graph.state_dict()) == state


def test_too_little_memory_fits_in_parts_and_says_so():
    graph, channels = prepared(Plain(nn.Conv2d(48, 5, 3, padding=1), inner=48))
    plan = channels.plan(0.25, seed=1)
    small = narrowed(graph, channels, plan)
    whole, tight = (
        Compensate(channels, plan, calibration(), Compensation(positions=ALL, memory_mb=memory)).run(small) for memory in (2048, 1)
    )
    assert whole.repairs[0].parts == 1
    assert tight.repairs[0].parts > 1
    assert whole.repairs[0].after <= tight.repairs[0].after < whole.repairs[0].before
    assert error(graph, tight.graph, images()) < error(graph, small, images())
    parts = collect(graph, ["second"], calibration(), 20, 1 << 18)["second"].parts
    assert sum(part.covariance.numel() * 8 for part in parts) <= 1 << 18
    assert [part.columns.start for part in parts[1:]] == [part.columns.stop for part in parts[:-1]]


def test_statistics_of_several_passes_are_those_of_one():
    graph, channels = prepared(deep())
    nodes = list(readers_of(channels))
    one = collect(graph, nodes, calibration(), 10)
    several = collect(graph, nodes, calibration(), 10, memory_bytes=4 * 8 * 90 * 90)
    for name in nodes:
        assert torch.equal(one[name].parts[0].covariance, several[name].parts[0].covariance)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(self.twice(torch.relu(self.twice(x))).mean((2, 3)))


def test_a_layer_that_is_called_twice_is_left_alone_and_named():
    graph, channels = prepared(Shared())
    assert beyond_repair(channels) == {"twice": "it is called 2 times with one weight"}
    plan = channels.plan(0.25, seed=0)
    found = Compensate(channels, plan, calibration(), SETTINGS["own"]).run(narrowed(graph, channels, plan))
    assert "twice" not in [repair.layer for repair in found.repairs]


def test_nothing_removed_nothing_changed():
    graph, channels = prepared(Residual(8, 12))
    plan = Plan.keep({})
    assert not Compensate(channels, plan, calibration())(graph).modified
    assert Compensate(channels, channels.plan(0.5), calibration())(narrowed(graph, channels, channels.plan(0.5))).modified


def test_features_that_are_not_finite_are_refused_and_modes_and_hooks_are_as_they_were():
    graph, _ = prepared(Residual(8, 12))
    with torch.no_grad():
        graph.get_submodule("stem").weight.fill_(3e38)
    graph.train()
    graph.get_submodule("bn1").eval()
    modes = {name: module.training for name, module in graph.named_modules()}
    hooks = {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in graph.named_modules()}
    channels = compressor.analyze(graph)
    plan = channels.plan(0.5, seed=0)
    state = digest_of_tensors(graph.state_dict())
    for settings in SETTINGS.values():
        with pytest.raises(DataError, match=r"batch 0 .*NaN or infinity at the input of `conv"):
            Compensate(channels, plan, calibration(), settings).run(compressor.apply(plan, graph))
    assert {name: module.training for name, module in graph.named_modules()} == modes
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in graph.named_modules()} == hooks
    assert digest_of_tensors(graph.state_dict()) == state


def test_the_same_seed_gives_the_same_weights_and_positions_are_sampled():
    graph, channels = prepared(Residual(8, 12))
    plan = channels.plan(0.5, seed=0)
    small = narrowed(graph, channels, plan)
    states = [
        digest_of_tensors(Compensate(channels, plan, calibration(), Compensation(positions=5), seed).run(small).graph.state_dict())
        for seed in (0, 0, 1)
    ]
    assert states[0] == states[1] != states[2]


def test_the_jobs_read_what_stays():
    graph, channels = prepared(Residual(8, 12))
    plan = Plan.keep({"conv1": [1, 4, 5]})
    job = next(j for j in jobs_of(channels, channels.kept_masks(plan), narrowed(graph, channels, plan)) if j.loses)
    assert job.reader.layer == "conv2"
    assert job.reader.norm == "bn2"
    assert job.reader.shortcut is not None
    assert job.columns.tolist() == [[*range(9, 18), *range(36, 54)]]
    assert job.rows.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("name", "value"), [("features", "both"), ("rescale", 2), ("ridge", -1.0), ("images", 2), ("positions", 0)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(DataError, match=name):
        Compensation(**{name: value})


def test_the_prefix_of_the_original_serves_the_narrowed_network():
    graph, channels = prepared(Residual(8, 12))
    plan = Plan.keep({"conv1": [1, 4, 5]})
    small = narrowed(graph, channels, plan)
    prefix = Prefix(graph, calibration(), Shelf(1 << 30))
    prefix.before("conv1")
    found = torch.cat([outputs_of(output)[0] for output in prefix.fork(small).finish()])
    assert torch.equal(found, outputs(small, images()).float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("how", SETTINGS)
def test_a_network_on_a_gpu_is_repaired_there(how):
    model = randomize(Residual(8, 12))
    graph = compressor.trace(model, (torch.zeros(1, 3, 8, 8),)).eval()
    on_gpu = compressor.trace(copy.deepcopy(model).cuda(), (torch.zeros(1, 3, 8, 8, device="cuda"),)).eval()
    found = []
    for network in (graph, on_gpu):
        channels = compressor.analyze(network)
        plan = channels.plan(0.5, seed=1)
        found.append(Compensate(channels, plan, calibration(), SETTINGS[how]).run(narrowed(network, channels, plan)).graph)
    expected = outputs(found[0], images())
    assert torch.allclose(outputs(found[1], images().cuda()).cpu(), expected, atol=1e-3 * float(expected.abs().max()))

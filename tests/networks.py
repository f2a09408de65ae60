"""Small networks and the oracle, shared by the tests of passes."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.layers.factorizable import sizes_of
from compressor.passes.layers.forms import FORMS
from compressor.passes.tracing.trace import outputs_of
from compressor.passes.transforms.factorize_conv import FactorizeConv
from compressor.passes.transforms.verify import relative_error, run_masked
from compressor.runtime.timing.protocol import Protocol
from compressor.values.plan import Factorization

QUICK = Protocol(warm_up_s=0.02, settle_s=0.1, min_samples=30, max_samples=60, max_s=2.0)
TOLERANCE = 1e-4  # float32: see compressor.passes.transforms.verify.TOLERANCE


class Net(nn.Module):
    """Layers by name, and a forward given as a function."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                setattr(self, name, layer)
        self._function = forward

    def forward(self, x):
        return self._function(self, x)


def conv(i, o, k=3, **kw):
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)


def head(n):
    return nn.Linear(n, 4)


def end(m, x):
    return m.fc(x.flatten(2).mean(-1))


def with_buffer(net, **buffers):
    for name, value in buffers.items():
        net.register_buffer(name, value)
    return net


def cbr(i, o, k=3, **kw):
    return nn.Sequential(conv(i, o, k, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())


def randomize(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts away from 0 and 1, so that nothing is right by luck."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean") or (name.endswith("bias") and tensor.is_floating_point()):
                tensor.normal_(0, 0.1, generator=generator)
            elif name.endswith(("layer_scale", "gamma")) or (name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def factorized(graph, form: str):
    """A `Residual` with its middle layer as a sequence of about half its ranks."""
    full = FORMS[form].full(sizes_of(graph.get_submodule("conv1")))
    one = Factorization("conv1", form, tuple(max(rank // 2, 1) for rank in full))
    return FactorizeConv([one])(graph).graph.eval()


def check(model: nn.Module, inputs, ratio: float, seed: int | None):
    """See `check_plans`; one plan, with the small network."""
    graph = compressor.trace(model, inputs)
    channels = compressor.analyze(graph)
    plan = channels.plan(ratio, seed=seed)
    return channels, plan, check_plan(model, inputs, channels, plan)


def zero_blocks(tensors, channels, plan):
    """What no slice says: the blocks of a grouped weight lose different positions."""
    masks = channels.kept_masks(plan)
    for slot in channels.walk.labeler.slots.values():
        kept = channels.kept_labels(slot.labels, masks).reshape(slot.blocks, -1)
        if slot.name in tensors and not (kept == kept[0]).all():
            blocks = tensors[slot.name].view(slot.blocks, -1, *tensors[slot.name].shape[1:])
            for block, own in zip(blocks, kept, strict=True):
                block.index_fill_(slot.axis, torch.from_numpy(np.flatnonzero(~own)), 0)


def check_plan(model: nn.Module, inputs, channels, plan):
    """Removed = masked, by two oracles: masks in front of every reader, and zeroed slices of the user's own model.

    Also: shapes of outputs, another batch size, the argument left alone, costs as computed, keys of `state_dict`.
    """
    graph = channels.graph
    before = copy.deepcopy(graph.state_dict())
    small = compressor.apply(plan, graph)
    assert all(torch.equal(before[k], v) for k, v in graph.state_dict().items()), "apply changed its argument"
    with torch.no_grad():
        found = outputs_of(small.eval()(*inputs))
        original = outputs_of(model.eval()(*inputs))
    assert [x.shape for x in found] == [x.shape for x in original]
    assert relative_error(found, run_masked(channels, plan, inputs)) < TOLERANCE
    if graph.meta["compressor.dynamic_batch"]:
        three = tuple(torch.randn(3, *x.shape[1:]) for x in inputs)
        with torch.no_grad():
            assert relative_error(outputs_of(small(*three)), run_masked(channels, plan, three)) < TOLERANCE
    lossy = any(group.lossy for group in channels.free if len(dict(plan.kept).get(group.name, range(group.size))) < group.size)
    if not lossy and not plan.removed:  # statistics over what stays are not those over zeros
        twin = copy.deepcopy(model).eval()
        tensors = twin.state_dict()
        for name, axis, removed in channels.slices(plan):
            if name in tensors and tensors[name].is_floating_point():
                tensors[name].index_fill_(axis, torch.tensor(removed), 0)
        zero_blocks(tensors, channels, plan)
        with torch.no_grad():
            assert relative_error(found, outputs_of(twin(*inputs))) < TOLERANCE
    costs = channels.costs_of(channels.structure(plan))
    assert costs.params[0] == sum(p.numel() for p in small.parameters())
    again = compressor.analyze(small)
    assert again.costs(again.widths([again.full])).macs[0] == costs.macs[0]
    return small


def check_effective(model: nn.Module, inputs, most: float = 0.8):
    """`check_plan` from one channel to all but one, at random and by norm; at half, at most a share of the parameters stays."""
    graph = compressor.trace(model, inputs)
    channels = compressor.analyze(graph)
    for ratio, seed in ((0.01, None), (0.01, 0), (0.3, 1), (0.5, None), (0.5, 0), (0.8, 2), (0.99, None), (0.99, 1)):
        small = check_plan(model, inputs, channels, channels.plan(ratio, seed=seed))
        if ratio >= 0.5:
            share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in graph.parameters())
            assert share < most, [(group.name, group.frozen) for group in channels.groups]
    one = compressor.Plan.keep({g.name: list(range(g.size))[g.granularity :] for g in channels.free if g.size > g.granularity == 1})
    check_plan(model, inputs, channels, one)
    return channels


class Residual(nn.Module):
    """Stem, one residual block, linear head."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.drop(x.mean((2, 3))))


def residual_graph():
    """`Residual`, traced; the same weights every time."""
    torch.manual_seed(0)
    return compressor.trace(randomize(Residual()).eval(), (torch.randn(1, 3, 8, 8),))


def first_output(graph, x):
    """The first output of a graph, float64."""
    with torch.no_grad():
        return outputs_of(graph(x))[0].double()


def output_error(graph, small, x):
    """||small(x) - graph(x)||² / ||graph(x)||² of the first outputs."""
    expected = first_output(graph, x)
    return float((first_output(small, x) - expected).square().sum() / expected.square().sum())

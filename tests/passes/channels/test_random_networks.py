"""Random networks of random constructs, random legal plans: removed = masked, shapes, round trips."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import compressor
from compressor.passes.criteria import select
from tests.networks import check_plan, randomize

SIDE = 8


class Random(nn.Module):
    """Runs a program: a list of `(construct, number)`. Every construct takes (n, c, 8, 8) and gives (n, any c, 8, 8)."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.layers = nn.ModuleDict()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        channels, earlier = 8, [8]
        for k, (name, number) in enumerate(program):
            layers, channels = CONSTRUCTS[name](channels, earlier, number)
            for part, layer in layers.items():
                self.layers[f"{k}_{part}"] = layer
            earlier.append(channels)
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        x = self.stem(x)
        earlier = [x]
        for k, (name, number) in enumerate(self.program):
            x = globals()[f"run_{name}"](lambda part, k=k: self.layers[f"{k}_{part}"], x, earlier, number)
            earlier.append(x)
        return self.head(x.mean((2, 3)))


def conv(i, o, k=3, groups=1):
    return nn.Conv2d(i, o, k, padding=k // 2, groups=groups)


def make_conv(c, earlier, n):
    o = (4, 6, 8, 12)[n % 4]
    return {"conv": conv(c, o, 1 + 2 * (n % 2)), "norm": nn.BatchNorm2d(o)}, o


def run_conv(layer, x, earlier, n):
    return F.relu(layer("norm")(layer("conv")(x)))


def divisor(c, n):
    return [d for d in range(1, c + 1) if c % d == 0][n % sum(c % d == 0 for d in range(1, c + 1))]


def make_grouped(c, earlier, n):
    g = divisor(c, n)
    return {"conv": conv(c, g * (1 + n % 3), groups=g)}, g * (1 + n % 3)


def run_grouped(layer, x, earlier, n):
    return layer("conv")(x)


def make_depthwise(c, earlier, n):
    return {"conv": conv(c, c * (1 + n % 2), groups=c)}, c * (1 + n % 2)


run_depthwise = run_grouped


def make_norm(c, earlier, n):
    kinds = (
        nn.BatchNorm2d(c),
        nn.GroupNorm(divisor(c, n), c),
        nn.InstanceNorm2d(c, affine=True),
        nn.PReLU(c),
        nn.LocalResponseNorm(3),
    )
    return {"norm": kinds[n % 5]}, c


def run_norm(layer, x, earlier, n):
    return layer("norm")(x)


def make_last(c, earlier, n):
    return {"norm": nn.LayerNorm(c), "up": nn.Linear(c, 2 * c), "down": nn.Linear(2 * c, c)}, c


def run_last(layer, x, earlier, n):
    y = layer("norm")(x.permute(0, 2, 3, 1))
    return x + layer("down")(F.gelu(layer("up")(y))).permute(0, 3, 1, 2)


def make_residual(c, earlier, n):
    return {"conv": conv(c, earlier[n % len(earlier)])}, earlier[n % len(earlier)]


def run_residual(layer, x, earlier, n):
    return F.relu(layer("conv")(x) + earlier[n % len(earlier)])


def make_concat(c, earlier, n):
    return {}, c + earlier[n % len(earlier)]


def run_concat(layer, x, earlier, n):
    return torch.cat([x, earlier[n % len(earlier)]][:: 1 - 2 * (n % 2)], 1)


def make_gate(c, earlier, n):
    return {"conv": conv(c, 2 * (2 + n % 5), 1)}, 2 + n % 5


def run_gate(layer, x, earlier, n):
    first, second = layer("conv")(x).chunk(2, 1)
    return first * torch.sigmoid(second)


def make_parts(c, earlier, n):
    first = 1 + n % 7
    return {"conv": conv(c, 8), "one": conv(first, 3), "other": conv(8 - first, 4)}, 7


def run_parts(layer, x, earlier, n):
    one, other = torch.split(layer("conv")(x), [1 + n % 7, 7 - n % 7], 1)
    return torch.cat([layer("other")(other), layer("one")(one)], 1)


def make_shuffle(c, earlier, n):
    return {}, c


def run_shuffle(layer, x, earlier, n):
    b, c, h, w = x.shape
    g = divisor(c, n)
    return x.view(b, g, c // g, h, w).transpose(1, 2).reshape(b, c, h, w)


def make_squeeze(c, earlier, n):
    return {"down": conv(c, 3, 1), "up": conv(3, c, 1)}, c


def run_squeeze(layer, x, earlier, n):
    return x * torch.sigmoid(layer("up")(F.relu(layer("down")(x.mean((2, 3), keepdim=True)))))


def make_pixels(c, earlier, n):
    return {"conv": conv(4 * c, 6)}, 6


def run_pixels(layer, x, earlier, n):
    return F.pixel_shuffle(F.pixel_unshuffle(layer("conv")(F.pixel_unshuffle(F.interpolate(x, scale_factor=2.0), 2)), 2), 2)


def make_padded(c, earlier, n):
    return {"conv": conv(c, c + 3)}, c + 3


def run_padded(layer, x, earlier, n):
    return layer("conv")(x) + F.pad(x, (0, 0, 0, 0, n % 4, 3 - n % 4))


def make_moved(c, earlier, n):
    return {}, c


def run_moved(layer, x, earlier, n):
    return (x.flip(1), torch.roll(x, n, 1), x.flatten(2).transpose(1, 2).reshape(-1, SIDE, SIDE, x.shape[1]).permute(0, 3, 1, 2))[
        n % 3
    ]


def make_indexed(c, earlier, n):
    return {"conv": conv(c, 8)}, 5


def run_indexed(layer, x, earlier, n):
    return layer("conv")(x)[:, [(n + 3 * k) % 8 for k in range(5)]]


def make_attention(c, earlier, n):
    return {"qkv": nn.Linear(c, 36), "out": nn.Linear(12, c)}, c


def run_attention(layer, x, earlier, n):
    b, c, h, w = x.shape
    heads = (2, 3, 4)[n % 3]
    q, k, v = layer("qkv")(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, heads, 12 // heads).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v) if n % 2 else torch.softmax(q @ k.transpose(-2, -1), -1) @ v
    return x + layer("out")(y.transpose(1, 2).reshape(b, h * w, 12)).transpose(1, 2).reshape(b, c, h, w)


def make_transposed(c, earlier, n):
    g = divisor(c, n)
    return {"conv": nn.ConvTranspose2d(c, 2 * g, 3, padding=1, groups=g)}, 2 * g


run_transposed = run_grouped

CONSTRUCTS = {name.removeprefix("make_"): function for name, function in list(globals().items()) if name.startswith("make_")}


@st.composite
def networks(draw):
    """A program that does not grow without bound."""
    program = draw(st.lists(st.tuples(st.sampled_from(sorted(CONSTRUCTS)), st.integers(0, 11)), min_size=1, max_size=7))
    channels, earlier, kept = 8, [8], []
    for name, number in program:
        _, after = CONSTRUCTS[name](channels, earlier, number)
        if after <= 40:
            kept.append((name, number))
            channels = after
            earlier.append(after)
    return kept or [("conv", 0)]


def check_random(program, seed):
    torch.manual_seed(0)
    model = randomize(Random(program))
    inputs = (torch.randn(2, 3, SIDE, SIDE),)
    channels = compressor.analyze(compressor.trace(model, inputs))
    assert not channels.unknown
    generator = np.random.default_rng(seed)
    kept = {}
    for group in channels.free:
        width = int(generator.integers(1, group.size // group.granularity + 1)) * group.granularity
        kept[group.name] = select(group, generator.random(group.size), width)
    removed = {branch.at: branch.name for branch in channels.branches if generator.random() < 0.5}  # one at most of an addition
    plan = compressor.Plan.keep(kept, channels.digest, removed=removed.values())
    assert compressor.Plan.from_json(plan.to_json()) == plan
    widths = {name: len(indices) for name, indices in kept.items()}
    assert channels.nearest(widths).widths == channels.structure(plan).widths
    small = check_plan(model, inputs, channels, plan)
    again = compressor.apply(plan, channels.graph)
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(*inputs), small.eval()(*inputs))


COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=60, **COMMON)
@given(networks(), st.integers(0, 2**32 - 1))
@example([("gate", 4), ("transposed", 9), ("grouped", 10)], 374)  # blocks of a transposed weight lose different outputs
def test_any_legal_plan_of_any_network_removes_what_it_masks(program, seed):
    check_random(program, seed)


@pytest.mark.slow
@settings(max_examples=600, **{**COMMON, "derandomize": False})
@given(networks(), st.integers(0, 2**32 - 1))
def test_any_legal_plan_of_many_more_networks_removes_what_it_masks(program, seed):
    check_random(program, seed)


@pytest.mark.parametrize("name", sorted(CONSTRUCTS))
def test_every_construct_of_these_networks_is_pruned(name):
    model = randomize(Random([("conv", 3), (name, 1), ("conv", 2)]))
    channels = compressor.analyze(compressor.trace(model, (torch.randn(2, 3, SIDE, SIDE),)))
    small = compressor.apply(channels.plan(0.5), channels.graph)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in channels.graph.parameters())

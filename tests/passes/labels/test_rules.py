"""Every construct: a tiny net per line, pruned effectively, removed = masked."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.labels.labeler import Value
from compressor.passes.labels.rules import EDITS, RULES, edit, rule
from tests.networks import Net, check, check_effective, conv, end, head, randomize

X2 = (2, 3, 8, 8)


def concatenated(m, x):
    a = F.relu(m.a(x))
    return end(m, m.c(torch.cat([a, m.b(a)], 1)))


def zero_padded(front, back):
    def forward(m, x):
        a = F.relu(m.a(x))
        return end(m, F.relu(F.pad(a[:, :, ::2, ::2], (0, 0, 0, 0, front, back)) + m.b(a)))

    return forward


def squeeze_excite(m, x):
    a = m.a(x)
    gate = torch.sigmoid(m.up(F.relu(m.down(a.mean((2, 3), keepdim=True)))))
    return end(m, m.b(a * gate))


def squeeze_excite_linear(m, x):
    a = m.a(x)
    gate = torch.sigmoid(m.up(F.relu(m.down(a.mean((2, 3))))))
    return end(m, m.b(a * gate[:, :, None, None]))


def chunked(m, x):
    first, second = m.a(x).chunk(2, dim=1)
    return end(m, torch.cat([m.b(first), m.c(second)], 1))


def gated(m, x):
    first, second = m.a(x).chunk(2, dim=1)
    return end(m, m.b(first * torch.sigmoid(second)))


def split_sizes(m, x):
    first, second = torch.split(m.a(x), [5, 7], dim=1)
    return end(m, torch.cat([m.b(first), m.c(second)], 1))


def sliced(m, x):
    a = m.a(x)
    return end(m, torch.cat([m.b(a[:, :5]), m.c(a[:, 5:-1])], 1))


def stepped(m, x):
    a = m.a(x)
    return end(m, m.b(a[:, ::2]) + m.c(a[:, 1::2]))


def shuffled(m, x):
    a = m.a(x)
    n, c, h, w = a.shape
    return end(m, m.b(a.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)))


def channels_last_mlp(m, x):
    a = m.a(x).permute(0, 2, 3, 1)
    a = m.out(F.gelu(m.up(a)))
    return end(m, a.permute(0, 3, 1, 2))


def layer_scaled(m, x):
    a = m.a(x)
    return end(m, a + m.layer_scale * m.b(a))


def weight_shared(m, x):
    a = F.relu(m.a(x))
    return end(m, m.b(F.relu(m.b(a))))


def expanded(m, x):
    a = m.a(x)
    return end(m, m.b(a * a.mean((2, 3), keepdim=True).expand(-1, 8, 8, 8)))


def viewed(m, x):
    return m.wide(F.max_pool2d(m.a(x), 2).view(-1, 8 * 4 * 4))


def attention_like(m, x):
    a = m.a(x).flatten(2)
    weights = torch.softmax(m.q(x).flatten(2).transpose(1, 2) @ m.k(x).flatten(2), -1)
    return end(m, m.b((a @ weights).view(-1, 8, 8, 8)))


def interpolated(m, x):
    a = F.interpolate(m.a(x), scale_factor=2, mode="bilinear", align_corners=False)
    return end(m, m.b(F.adaptive_avg_pool2d(F.avg_pool2d(a, 2), 4)))


def reflected(m, x):
    return end(m, m.b(F.pad(m.a(x), (1, 1, 1, 1), mode="reflect")))


def parts_without_parameters(m, x):
    first, second = m.a(x).chunk(2, 1)
    return end(m, m.b(torch.cat([F.max_pool2d(first, 3, 1, 1), F.avg_pool2d(second, 3, 1, 1)], 1)))


def narrow_part_in_place(m, x):
    a = m.a(x) * 1
    a[:, 2:5].clamp_(0)
    return end(m, m.b(a))


def strided_part_in_place(m, x):
    a = m.a(x) * 1
    a[:, ::2].mul_(3)
    return end(m, m.b(m.c(a)))


def batch_slices(m, x):
    a = m.a(x)
    return end(m, m.b(a[0:] + a[-1:])) + m.fc(m.b(a)[: x.shape[0]].mean((2, 3)))


def siamese(m, x):
    both = m.a(torch.cat([x, x.flip(3)], 0))
    return end(m, m.b(both[: x.shape[0]] - both[x.shape[0] :]))


def folded_into_batch(m, x):
    a = m.a(x)
    return end(m, m.b((a.view(a.shape[0] * 8, 1, 8, 8) * 2).view(-1, 8, 8, 8)) + m.c(x))


def grouped_used_twice(m, x):
    return end(m, m.c(m.g(F.relu(m.a(x))) + m.g(F.relu(m.b(x)))))


def weight_standardized(m, x):
    weight = m.b.weight - m.b.weight.mean((1, 2, 3), keepdim=True)
    return end(m, m.c(F.relu(F.conv2d(m.a(x), weight, m.b.bias, padding=1))))


def dtype_round_trip(m, x):
    a = m.a(x)
    return end(m, m.b(a.double().float() + a.mean((2, 3), keepdim=True).expand_as(a)))


def norm(layer):
    return lambda: Net(lambda m, x: end(m, m.b(F.relu(m.n(m.a(x))))), a=conv(3, 12), n=layer, b=conv(12, 8), fc=head(8))


NETS = {
    "sequential": lambda: Net(lambda m, x: end(m, m.b(F.relu(m.a(x)))), a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "grouped": lambda: Net(lambda m, x: end(m, m.b(F.relu(m.a(x)))), a=conv(3, 12), b=conv(12, 18, groups=3), fc=head(18)),
    "grouped twice": lambda: Net(
        lambda m, x: end(m, m.c(m.b(F.relu(m.a(x))))),
        a=conv(3, 12),
        b=conv(12, 24, groups=3),
        c=conv(24, 12, groups=6),
        fc=head(12),
    ),
    "depthwise": lambda: Net(
        lambda m, x: end(m, m.c(m.b(m.a(x)))), a=conv(3, 12), b=conv(12, 12, groups=12), c=conv(12, 8), fc=head(8)
    ),
    "depthwise with multiplier": lambda: Net(
        lambda m, x: end(m, m.c(m.b(m.a(x)))), a=conv(3, 6), b=conv(6, 18, groups=6), c=conv(18, 8), fc=head(8)
    ),
    "transposed": lambda: Net(
        lambda m, x: end(m, m.b(F.relu(m.a(x)))), a=conv(3, 12), b=nn.ConvTranspose2d(12, 8, 2, stride=2), fc=head(8)
    ),
    "transposed, grouped": lambda: Net(
        lambda m, x: end(m, m.b(F.relu(m.a(x)))), a=conv(3, 12), b=nn.ConvTranspose2d(12, 9, 2, stride=2, groups=3), fc=head(9)
    ),
    "transposed, depthwise": lambda: Net(
        lambda m, x: end(m, m.b(F.relu(m.a(x)))), a=conv(3, 6), b=nn.ConvTranspose2d(6, 12, 2, groups=6), fc=head(12)
    ),
    "concat": lambda: Net(concatenated, a=conv(3, 6), b=conv(6, 10), c=conv(16, 8), fc=head(8)),
    "concat with itself": lambda: Net(
        lambda m, x: end(m, m.b(torch.cat([m.a(x)] * 2, 1))), a=conv(3, 6), b=conv(12, 8), fc=head(8)
    ),
    "zero-padded shortcut, both sides": lambda: Net(zero_padded(3, 5), a=conv(3, 8), b=conv(8, 16, stride=2), fc=head(16)),
    "zero-padded shortcut, front": lambda: Net(zero_padded(8, 0), a=conv(3, 8), b=conv(8, 16, stride=2), fc=head(16)),
    "zero-padded shortcut, back": lambda: Net(zero_padded(0, 8), a=conv(3, 8), b=conv(8, 16, stride=2), fc=head(16)),
    "squeeze-excite": lambda: Net(squeeze_excite, a=conv(3, 12), down=conv(12, 6, 1), up=conv(6, 12, 1), b=conv(12, 8), fc=head(8)),
    "squeeze-excite with linear": lambda: Net(
        squeeze_excite_linear, a=conv(3, 12), down=nn.Linear(12, 6), up=nn.Linear(6, 12), b=conv(12, 8), fc=head(8)
    ),
    "chunk, halves apart": lambda: Net(chunked, a=conv(3, 12), b=conv(6, 4), c=conv(6, 5), fc=head(9)),
    "chunk, halves meet": lambda: Net(gated, a=conv(3, 12), b=conv(6, 8), fc=head(8)),
    "glu": lambda: Net(lambda m, x: end(m, m.b(F.glu(m.a(x), 1))), a=conv(3, 12), b=conv(6, 8), fc=head(8)),
    "split by sizes": lambda: Net(split_sizes, a=conv(3, 12), b=conv(5, 4), c=conv(7, 5), fc=head(9)),
    "slices": lambda: Net(sliced, a=conv(3, 12), b=conv(5, 4), c=conv(6, 5), fc=head(9)),
    "stepped slices": lambda: Net(stepped, a=conv(3, 12), b=conv(6, 8), c=conv(6, 8), fc=head(8)),
    "channel shuffle by view": lambda: Net(shuffled, a=conv(3, 12), b=conv(12, 8, groups=2), fc=head(8)),
    "nn.ChannelShuffle": lambda: Net(
        lambda m, x: end(m, m.b(m.s(m.a(x)))), a=conv(3, 12), s=nn.ChannelShuffle(3), b=conv(12, 8), fc=head(8)
    ),
    "pixel shuffle": lambda: Net(lambda m, x: end(m, m.b(F.pixel_shuffle(m.a(x), 2))), a=conv(3, 24), b=conv(6, 8), fc=head(8)),
    "pixel unshuffle": lambda: Net(lambda m, x: end(m, m.b(F.pixel_unshuffle(m.a(x), 2))), a=conv(3, 6), b=conv(24, 8), fc=head(8)),
    "flatten with spatial extent": lambda: Net(
        lambda m, x: m.wide(F.max_pool2d(m.a(x), 2).flatten(1)), a=conv(3, 8), wide=nn.Linear(8 * 4 * 4, 4)
    ),
    "hard-coded view": lambda: Net(viewed, a=conv(3, 8), wide=nn.Linear(8 * 4 * 4, 4)),
    "channels last": lambda: Net(channels_last_mlp, a=conv(3, 8), up=nn.Linear(8, 16), out=nn.Linear(16, 6), fc=head(6)),
    "layer scale": lambda: Net(layer_scaled, a=conv(3, 8), b=conv(8, 8), layer_scale=nn.Parameter(torch.rand(8, 1, 1)), fc=head(8)),
    "module used twice": lambda: Net(weight_shared, a=conv(3, 8), b=conv(8, 8), fc=head(8)),
    "expand": lambda: Net(expanded, a=conv(3, 8), b=conv(8, 6), fc=head(6)),
    "matmul": lambda: Net(attention_like, a=conv(3, 8), q=conv(3, 6), k=conv(3, 6), b=conv(8, 6), fc=head(6)),
    "interpolate and pool": lambda: Net(interpolated, a=conv(3, 8), b=conv(8, 6), fc=head(6)),
    "reflection padding": lambda: Net(reflected, a=conv(3, 8), b=nn.Conv2d(8, 6, 3), fc=head(6)),
    "parts without parameters": lambda: Net(parts_without_parameters, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "a part changed in place": lambda: Net(narrow_part_in_place, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "a strided part changed in place": lambda: Net(strided_part_in_place, a=conv(3, 4), c=conv(4, 12), b=conv(12, 8), fc=head(8)),
    "slices of the batch": lambda: Net(batch_slices, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "siamese over the batch": lambda: Net(siamese, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "channels folded into the batch": lambda: Net(folded_into_batch, a=conv(3, 8), b=conv(8, 12), c=conv(3, 12), fc=head(12)),
    "grouped, used twice": lambda: Net(
        grouped_used_twice, a=conv(3, 8), b=conv(3, 8), g=conv(8, 8, groups=2), c=conv(8, 6), fc=head(6)
    ),
    "weight standardisation": lambda: Net(weight_standardized, a=conv(3, 6), b=conv(6, 16), c=conv(16, 8), fc=head(8)),
    "dtypes and expand_as": lambda: Net(dtype_round_trip, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "squeeze of everything": lambda: Net(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.a(x), 1).squeeze()), a=conv(3, 8), fc=head(8)),
    "transposed, weight norm": lambda: Net(
        lambda m, x: end(m, m.b(m.t(m.a(x)))),
        a=conv(3, 8),
        t=torch.nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(8, 16, 2)),
        b=conv(16, 12),
        fc=head(12),
    ),
    "pixel shuffle to few channels": lambda: Net(
        lambda m, x: m.fc(F.pixel_shuffle(m.b(m.a(x)), 3).sum((2, 3))), a=conv(3, 12), b=conv(12, 18), fc=head(2)
    ),
    "batch norm": norm(nn.BatchNorm2d(12)),
    "instance norm": norm(nn.InstanceNorm2d(12, affine=True)),
    "group norm": norm(nn.GroupNorm(4, 12)),
    "prelu": norm(nn.PReLU(12)),
    "prelu, one slope": norm(nn.PReLU()),
}


@pytest.mark.parametrize("name", NETS)
def test_removed_equals_masked_from_one_channel_to_all_but_one(name):
    model = randomize(NETS[name]())
    check_effective(model, (torch.randn(X2),))


def test_statistics_over_a_spatial_axis_that_holds_channels_are_lossy():
    def forward(m, x):
        return m.fc(m.n(m.a(x).flatten(2).transpose(1, 2)).mean(1))

    for layer in (nn.InstanceNorm1d(64), nn.InstanceNorm1d(64, affine=True), nn.GroupNorm(4, 64)):
        model = Net(forward, a=conv(3, 8), n=layer, fc=head(8))
        graph = compressor.trace(model, (torch.randn(X2),))
        group = compressor.analyze(graph, lossy=False).groups[0]
        assert group.frozen is not None
        assert "statistics" in group.frozen
        assert compressor.analyze(graph).groups[0].lossy


def test_a_pool_over_two_axes_of_a_tensor_of_three_is_understood():
    model = Net(lambda m, x: m.fc(F.max_pool2d(m.a(x).flatten(2), (2, 1)).flatten(1)), a=conv(3, 8), fc=nn.Linear(256, 4))
    (group, _) = compressor.analyze(compressor.trace(model, (torch.randn(X2),))).groups
    assert "spatial axis of aten.max_pool2d" in group.frozen


def test_macs_count_every_image_that_is_folded_into_the_batch():
    model = Net(lambda m, x: m.a(x.view(-1, 3, 4, 4)).flatten(1).view(x.shape[0], -1), a=conv(3, 8))
    channels = compressor.analyze(compressor.trace(model, (torch.randn(2, 6, 8, 8),)))
    assert channels.costs(channels.widths([channels.full])).macs[0] == 8 * (4 * 4) * 9 * 3 * 8


@pytest.mark.parametrize("dims", [1, 3])
def test_removed_equals_masked_in_other_dimensions(dims):
    kind, batch_norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv3d, nn.BatchNorm3d)
    transposed = nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose3d
    model = Net(
        lambda m, x: m.fc(m.t(F.relu(m.n(m.a(x)))).flatten(2).mean(-1)),
        a=kind(3, 12, 3),
        n=batch_norm(12),
        t=transposed(12, 6, 2),
        fc=head(6),
    )
    x = torch.randn(2, 3, *[6] * dims)
    _, plan, _ = check(randomize(model), (x,), 0.5, 0)
    assert {name: len(kept) for name, kept in plan.kept} == {"a": 6, "t": 3}


def test_layer_norm_over_channels_is_named_as_lossy_and_frozen_where_that_is_asked_for():
    model = Net(lambda m, x: m.fc(m.n(m.a(x).permute(0, 2, 3, 1)).mean((1, 2))), a=conv(3, 8), n=nn.LayerNorm(8), fc=head(8))
    graph = compressor.trace(model, (torch.randn(X2),))
    (group, _) = compressor.analyze(graph, lossy=False).groups
    assert group.frozen is not None
    assert "LayerNorm" in group.frozen
    channels = compressor.analyze(graph)
    assert channels.groups[0].frozen is None
    assert "LayerNorm" in channels.groups[0].lossy[0]
    small = compressor.apply(channels.plan(0.5), graph)
    assert small.get_submodule("n").normalized_shape == (4,)
    assert small(torch.randn(X2)).shape == (2, 4)


def test_an_op_without_a_rule_freezes_what_it_touches_and_is_named():
    model = Net(lambda m, x: end(m, m.b(torch.cumprod(m.a(x), 2)) + m.c(x)), a=conv(3, 8), b=conv(8, 6), c=conv(3, 6), fc=head(6))
    channels = compressor.analyze(compressor.trace(model, (torch.randn(X2),)))
    frozen = {group.name: group.frozen for group in channels.groups}
    assert "cumprod" in frozen["a"]
    assert frozen["b"] is None, "what the op does not touch stays free"
    assert any("cumprod" in op for op in channels.unknown)


def test_outputs_and_inner_features_that_are_returned_are_frozen():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 4)

        def forward(self, x):
            feature = self.a(x)
            return {"feature": feature, "out": self.c(F.relu(self.b(feature)))}

    channels = compressor.analyze(compressor.trace(Two(), (torch.randn(X2),)))
    frozen = {group.name: group.frozen for group in channels.groups}
    assert "model output" in frozen["a"]
    assert "model output" in frozen["c"]
    assert frozen["b"] is None


@torch.library.custom_op("compressor_tests::rotate", mutates_args=())
def rotate(x: torch.Tensor, by: int) -> torch.Tensor:
    """An op that nobody but its owner knows: the first `by` channels go to the end."""
    return torch.cat([x[:, by:], x[:, :by]], 1)


@rotate.register_fake
def _(x, by):
    return torch.empty_like(x)


def rotating():
    return randomize(Net(lambda m, x: end(m, m.b(rotate(m.a(x), 5))), a=conv(3, 12), b=conv(12, 8), fc=head(8)))


def test_an_op_of_the_users_own_is_frozen_until_it_has_a_rule_from_outside():
    key = torch.ops.compressor_tests.rotate
    model = rotating()
    channels = compressor.analyze(compressor.trace(model, (torch.randn(X2),)))
    assert "compressor_tests.rotate" in channels.groups[0].frozen
    try:

        @rule(key)
        def rotated(call, labeler):
            x = call.tensor("x")
            axes = {a: np.roll(labels, -call.integer("by")) if a == 1 else labels for a, labels in x.axes.items()}
            return Value(call.outputs[0], axes, x.why)

        @edit(key)
        def rotation(change):
            by = int(change.kept(change.inputs, 1)[: change.call.integer("by")].sum())
            change.set(1, "by", by)

        check_effective(model, (torch.randn(X2),))
    finally:
        RULES.pop(key, None)
        EDITS.pop(key, None)


def test_a_custom_autograd_function_is_understood_by_what_it_does():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    model = randomize(Net(lambda m, x: end(m, m.b(Double.apply(m.a(x)))), a=conv(3, 12), b=conv(12, 8), fc=head(8)))
    check_effective(model, (torch.randn(X2),))


def test_registering_a_rule_twice_raises():
    key = next(iter(RULES))
    with pytest.raises(ValueError, match="already has the rule"):
        rule(key)(lambda call, labeler: call.values[0])
    with pytest.raises(ValueError, match="already has the edit"):
        edit(torch.ops.aten.view)(lambda change: None)

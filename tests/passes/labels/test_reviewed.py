"""Defects that a review of the rules found, each as the smallest network that shows it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.tracing.shapes import shapes_of
from compressor.passes.transforms.verify import verify_removal
from tests.networks import Net, check_effective, randomize, with_buffer

X2 = (2, 3, 8, 8)


def point(i, o):
    return nn.Conv2d(i, o, 1)


def two(**layers):
    return {"a": point(3, 12), "b": point(12, 8), **layers}


def heads(layer, x, count=2):
    return layer(x).view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def computed_kernel(kernel, convolve=F.conv2d, **parameters):
    return Net(lambda m, x: m.b(F.relu(convolve(m.a(x), kernel(m), None, 1, 1))).mean((2, 3)), **parameters, **two())


def grouped_queries(repeat):
    def forward(m, x):
        t = m.e(x).flatten(2).transpose(1, 2)
        q, k, v = heads(m.q, t, 4), heads(m.k, t), heads(m.v, t)
        return m.p(repeat(q, k, v).transpose(1, 2).flatten(2)).mean(1)

    return Net(forward, e=nn.Conv2d(3, 6, 2, 2), q=nn.Linear(6, 16), k=nn.Linear(6, 8), v=nn.Linear(6, 8), p=nn.Linear(16, 4))


def interleaved(q, k, v):
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def expanded(q, k, v):
    def four(t):
        n, h, s, d = t.shape
        return t[:, :, None].expand(n, h, 2, s, d).reshape(n, 4, s, d)

    return F.scaled_dot_product_attention(q, four(k), four(v))


def built_in(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


PRUNED = {
    "average over channels": lambda: Net(
        lambda m, x: m.b(F.avg_pool3d(F.pad(m.a(x)[:, None], (0, 0, 0, 0, 2, 2)), (5, 1, 1), 1)[:, 0]).mean((2, 3)), **two()
    ),
    "divided by a deviation": lambda: Net(lambda m, x: m.b(m.a(x) / (m.a(x).std(1, keepdim=True) + 1)).mean((2, 3)), **two()),
    "type_as": lambda: Net(lambda m, x: m.b(m.a(x)).type_as(m.a(x)).mean((2, 3)), **two()),
    "depthwise transposed with dilation": lambda: Net(
        lambda m, x: m.b(F.conv_transpose2d(m.a(x), m.w, None, 1, 2, 0, 12, 2)).mean((2, 3)),
        **two(w=nn.Parameter(torch.randn(12, 1, 3, 3))),
    ),
    "stored matrix": lambda: Net(
        lambda m, x: (F.relu(m.a(x).mean((2, 3)) @ m.w) @ m.v), a=point(3, 12),
        w=nn.Parameter(torch.randn(12, 10)), v=nn.Parameter(torch.randn(10, 4)),
    ),
    "stored matrix, einsum": lambda: Net(
        lambda m, x: m.b(F.relu(torch.einsum("bchw,co->bohw", m.a(x), m.w))).mean((2, 3)),
        a=point(3, 12), w=nn.Parameter(torch.randn(12, 10)), b=point(10, 4),
    ),
    "addmm": lambda: Net(
        lambda m, x: m.c(F.relu(torch.addmm(m.s, m.a(x).mean((2, 3)), m.w))),
        a=point(3, 12), w=nn.Parameter(torch.randn(12, 10)), s=nn.Parameter(torch.randn(10)), c=nn.Linear(10, 4),
    ),
    "scale per head": lambda: Net(
        lambda m, x: m.b((m.a(x).view(-1, 3, 4, 8, 8) * m.s.view(1, 3, 1, 1, 1)).view(-1, 12, 8, 8)).mean((2, 3)),
        **two(s=nn.Parameter(torch.rand(3))),
    ),
    "gate per head": lambda: Net(
        lambda m, x: m.b((m.a(x).view(-1, 3, 4, 8, 8) * m.k(x).view(-1, 3, 1, 8, 8)).view(-1, 12, 8, 8)).mean((2, 3)),
        **two(k=point(3, 3)),
    ),
    "layer norm per head": lambda: Net(
        lambda m, x: m.b(m.n(m.a(x).permute(0, 2, 3, 1).reshape(-1, 8, 8, 3, 4)).flatten(3).permute(0, 3, 1, 2)).mean((2, 3)),
        **two(n=nn.LayerNorm(4)),
    ),
    "one channel repeated": lambda: Net(lambda m, x: m.b(m.a(x) * m.g(x).repeat(1, 12, 1, 1)).mean((2, 3)), **two(g=point(3, 1))),
    "kernel mixed from a bank": lambda: computed_kernel(
        lambda m: torch.einsum("k,koihw->oihw", m.mix.softmax(0), m.bank),
        mix=nn.Parameter(torch.randn(4)), bank=nn.Parameter(torch.randn(4, 12, 12, 3, 3)),
    ),
    "kernel composed of two (DO-Conv)": lambda: computed_kernel(
        lambda m: torch.einsum("dk,oid->oik", m.d, m.w).view(12, 12, 3, 3),
        d=nn.Parameter(torch.randn(9, 9)), w=nn.Parameter(torch.randn(12, 12, 9)),
    ),
    "kernel of an outer product": lambda: computed_kernel(
        lambda m: torch.einsum("oi,h,w->oihw", m.w, m.v, m.u),
        w=nn.Parameter(torch.randn(12, 12)), v=nn.Parameter(torch.randn(3)), u=nn.Parameter(torch.randn(3)),
    ),
    "transposed kernel from a bank": lambda: computed_kernel(
        lambda m: torch.einsum("k,kiohw->iohw", m.mix, m.bank), F.conv_transpose2d,
        mix=nn.Parameter(torch.randn(4)), bank=nn.Parameter(torch.randn(4, 12, 12, 3, 3)),
    ),
    "grouped queries, interleaved": lambda: grouped_queries(interleaved),
    "grouped queries, expanded": lambda: grouped_queries(expanded),
    "grouped queries, enable_gqa": lambda: grouped_queries(built_in),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_exactly(name):
    check_effective(randomize(PRUNED[name]()), (torch.randn(X2),), most=0.85)


KERNELS = [name for name in PRUNED if "kernel" in name]


@pytest.mark.parametrize("name", KERNELS)
def test_the_taps_of_a_computed_kernel_are_no_channels(name):
    channels = compressor.analyze(compressor.trace(randomize(PRUNED[name]()), (torch.randn(X2),)))
    assert {group.size for group in channels.free} <= {12}, channels.free
    graph = compressor.apply(channels.plan(0.5), channels.graph)
    convolutions = ("conv2d", "conv_transpose2d")
    kernels = [n.args[1] for n in graph.graph.nodes if getattr(n.target, "__name__", "").split(".")[0] in convolutions]
    assert kernels
    assert {shapes_of(kernel)[0][2:] for kernel in kernels} == {(3, 3)}


FROZEN = {
    "rolled twice": lambda: Net(lambda m, x: m.b(torch.roll(m.a(x), (3, 4), (1, 1))).mean((2, 3)), **two()),
    "rolled flat": lambda: Net(lambda m, x: m.b(torch.roll(m.a(x), 64)).mean((2, 3)), **two()),
    "repeats of a tensor": lambda: with_buffer(
        Net(lambda m, x: m.b(m.a(x).repeat_interleave(m.r, 1, output_size=12)).mean((2, 3)), **two()),
        r=torch.tensor([2, 0] + [1] * 10),
    ),
    "shorter index": lambda: with_buffer(
        Net(
            lambda m, x: m.b(m.a(x)).mean((2, 3)) + torch.gather(m.a(x).flatten(2), 2, m.i.expand(x.shape[0], 8, 5)).mean(2),
            **two(),
        ),
        i=torch.randint(0, 64, (1, 1, 5)),
    ),
    "take along": lambda: with_buffer(
        Net(lambda m, x: m.b(torch.take_along_dim(m.a(x), m.i, 1)).mean((2, 3)), **two()), i=torch.randperm(12).view(1, 12, 1, 1)
    ),
    "average that loses the edges": lambda: Net(
        lambda m, x: m.c(F.avg_pool3d(m.a(x)[:, None], (5, 1, 1), 1)[:, 0]).mean((2, 3)), a=point(3, 12), c=point(8, 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_follow_is_frozen_and_never_wrong(name):
    model = randomize(FROZEN[name]())
    graph = compressor.trace(model, (torch.randn(X2),))
    channels = compressor.analyze(graph)
    assert any(group.layers == ("a",) and group.frozen for group in channels.groups), channels.groups
    for ratio, seed in ((0.5, 0), (0.99, 1)):
        plan = channels.plan(ratio, seed=seed)
        small = compressor.apply(plan, graph)
        verify_removal(channels, plan, small)
        x = torch.randn(3 if graph.meta["compressor.dynamic_batch"] else 2, 3, 8, 8)
        assert small(x).shape == model(x).shape


def test_attention_with_weights_is_checked_at_other_batch_sizes():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.t, self.fc = nn.Conv2d(3, 16, 3, 3), nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            t = self.e(x).flatten(2).transpose(1, 2)
            return self.fc(self.t(t, t, t)[0].mean(1))

    channels = check_effective(randomize(Attention()), (torch.randn(2, 3, 9, 9),))
    macs = channels.costs(channels.widths([channels.full])).macs[0]
    assert macs == 9 * 27 * 16 + 9 * 16 * 48 + 2 * 4 * 81 * 4 + 9 * 16 * 16 + 16 * 4


def test_macs_of_attention_count_every_query():
    def forward(m, x):
        t = m.e(x).flatten(2).transpose(1, 2)
        q, k, v = (heads(layer, t) for layer in (m.q, m.k, m.v))
        return m.fc(F.scaled_dot_product_attention(q * m.c, k * m.c, v).transpose(1, 2).flatten(2).mean(1))

    layers = {name: nn.Linear(6, 16) for name in "qkv"}
    model = with_buffer(Net(forward, e=nn.Conv2d(3, 6, 2, 2), **layers, fc=nn.Linear(16, 4)), c=torch.rand(16, 8))
    channels = compressor.analyze(compressor.trace(model, (torch.randn(X2),)))
    assert channels.costs(channels.widths([channels.full])).macs[0] == 16 * 12 * 6 + 3 * 16 * 6 * 16 + 2 * 2 * 16 * 16 * 8 + 64


def test_a_size_that_depends_on_the_data_is_a_trace_error():
    model = with_buffer(Net(lambda m, x: m.b(m.a(x)[:, m.k]).mean((2, 3)), **two()), k=torch.ones(12, dtype=torch.bool))
    with pytest.raises(compressor.TraceError, match="depends on the data"):
        compressor.trace(model, (torch.randn(X2),))


def test_an_unbiased_deviation_keeps_two_channels():
    model = Net(lambda m, x: m.b(m.a(x) / m.a(x).std(1, keepdim=True)).mean((2, 3)), **two())
    channels = compressor.analyze(compressor.trace(model, (torch.randn(X2),)))
    assert dict(channels.nearest({"a": 0}).widths)["a"] == 2
    assert len(dict(channels.plan(1.0).kept)["a"]) == 2
    with pytest.raises(compressor.PlanError, match=r"keeps 1 of group `a`, aten.std.* needs at least 2"):
        channels.kept_masks(compressor.Plan.keep({"a": [3]}))

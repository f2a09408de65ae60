"""What real networks are built of, one small net per construct: pruned effectively, removed = masked, exported."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import compressor
from compressor.runtime.latency import check_onnx
from compressor.runtime.precision import PARITY
from tests.networks import check_effective, randomize
from tests.passes.test_rules import Net, conv, end, head

X2 = (2, 3, 8, 8)


def cbr(i, o, k=3, **kw):
    return nn.Sequential(conv(i, o, k, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())


def preactivated(m, x):
    a = m.stem(x)
    a = a + m.c1(F.relu(m.n1(a)))
    return end(m, F.relu(m.n2(a + m.c2(F.relu(m.n3(a))))))


def pooled_shortcut(m, x):
    a = F.relu(m.a(x))
    short = F.pad(F.avg_pool2d(a, 2), (0, 0, 0, 0, 2, 2))
    return end(m, F.relu(short + m.b(a)))


def dense(m, x):
    features = [m.stem(x)]
    for k in range(3):
        features.append(getattr(m, f"l{k}")(torch.cat(features, 1)))
    return end(m, m.out(torch.cat(features, 1)))


def concat_then_add(m, x):
    a = torch.cat([m.a(x), m.b(x)], 1)
    return end(m, m.d(F.relu(a + m.c(x))))


def grouped_after_concat(m, x):
    return end(m, m.out(m.g(torch.cat([m.a(x), m.b(x)], 1))))


def different_groups(m, x):
    a = F.relu(m.a(x))
    return end(m, m.out(torch.cat([m.g4(a), m.g6(a)], 1)))


def spatial_attention(m, x):
    a = m.a(x)
    reduced = torch.cat([a.mean(1, keepdim=True), a.amax(1, keepdim=True)], 1)
    return end(m, m.b(a * torch.sigmoid(m.gate(reduced))))


def space_to_depth(m, x):
    a = m.a(x)
    return end(m, m.b(torch.cat([a[..., ::2, ::2], a[..., 1::2, ::2], a[..., ::2, 1::2], a[..., 1::2, 1::2]], 1)))


def maxout(m, x):
    first, second = m.a(x).split(6, 1)
    return end(m, m.b(torch.maximum(first, second)))


def python_lists(m, x):
    y = list(m.a(x).chunk(2, 1))
    y.extend(layer(y[-1]) for layer in m.blocks)
    return end(m, m.out(torch.cat(y, 1)))


class C2f(nn.Module):
    """YOLO's: a split at a stored size, a list that grows."""

    def __init__(self):
        super().__init__()
        self.c = 6
        self.cv1, self.cv2 = cbr(3, 12, 1), cbr(24, 8, 1)
        self.m = nn.ModuleList(nn.Sequential(cbr(6, 6), cbr(6, 6)) for _ in range(2))
        self.fc = head(8)

    def forward(self, x):
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return end(self, self.cv2(torch.cat(y, 1)))


def csp(m, x):
    a = m.stem(x)
    return end(m, m.out(torch.cat([m.left(a) + m.block(m.left(a)), m.right(a)], 1)))


def res2net(m, x):
    parts = torch.split(m.a(x), 3, 1)
    outs = [parts[0]]
    for k, part in enumerate(parts[1:]):
        outs.append(getattr(m, f"c{k}")(part if k == 0 else part + outs[-1]))
    return end(m, m.b(torch.cat(outs, 1)))


def selective_kernel(m, x):
    branches = torch.stack([m.k3(x), m.k5(x)], 1)
    gate = m.up(F.relu(m.down(branches.sum(1).mean((2, 3), keepdim=True))))
    gate = torch.softmax(gate.view(-1, 2, 8, 1, 1), 1)
    return end(m, m.b((branches * gate).sum(1)))


def split_attention(m, x):
    a = F.relu(m.a(x)).view(-1, 2, 6, 8, 8)
    gap = a.sum(1).mean((2, 3), keepdim=True)
    gate = torch.softmax(m.up(F.relu(m.down(gap))).view(-1, 1, 2, 6).transpose(1, 2), 1).reshape(-1, 12, 1, 1)
    return end(m, m.b((a * gate.view(-1, 2, 6, 1, 1)).sum(1)))


def ghost(m, x):
    primary = m.primary(x)
    return end(m, m.b(torch.cat([primary, m.cheap(primary)], 1)[:, :14]))


def inception(m, x):
    a = m.stem(x)
    return end(m, m.out(torch.cat([m.b1(a), m.b3(m.b3r(a)), m.pool(F.max_pool2d(a, 3, 1, 1))], 1)))


def high_resolution(m, x):
    high, low = m.high(x), m.low(x)
    fused_high = F.relu(high + F.interpolate(m.up(low), scale_factor=2, mode="nearest"))
    fused_low = F.relu(low + m.down(high))
    return end(m, m.out(torch.cat([fused_high, F.interpolate(fused_low, scale_factor=2, mode="bilinear")], 1)))


def unet(m, x):
    a = m.e1(x)
    b = m.e2(F.max_pool2d(a, 2))
    up = m.up(b)
    return end(m, m.d1(torch.cat([up, a], 1)))


class Pyramid(nn.Module):
    """FPN and PAN with one head shared over the scales; a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = cbr(3, 8), cbr(8, 12, stride=2)
        self.lat1, self.lat2 = conv(8, 10, 1), conv(12, 10, 1)
        self.smooth, self.pan = conv(10, 10), conv(10, 10, stride=2)
        self.head = nn.Sequential(cbr(10, 9), conv(9, 4, 1))

    def forward(self, x):
        one = self.c1(x)
        two = self.c2(one)
        top = self.lat2(two)
        bottom = self.smooth(self.lat1(one) + F.interpolate(top, scale_factor=2.0))
        top = top + self.pan(bottom)
        return {"large": self.head(bottom), "small": self.head(top)}


def non_local(m, x):
    a = m.a(x)
    theta, phi, g = (layer(a).flatten(2) for layer in (m.theta, m.phi, m.g))
    weights = torch.softmax(theta.transpose(1, 2) @ phi, -1)
    y = (weights @ g.transpose(1, 2)).transpose(1, 2).reshape(-1, 6, 8, 8)
    return end(m, m.b(a + m.out(y)))


def tokens(m, x):
    return m.embed(x).flatten(2).transpose(1, 2)


def heads_by_hand(m, x):
    t = tokens(m, x)
    n, count, _ = t.shape
    q, k, v = m.qkv(m.n(t)).reshape(n, count, 3, 4, 5).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q * 5**-0.5 @ k.transpose(-2, -1)).softmax(-1)
    t = t + m.proj((weights @ v).transpose(1, 2).reshape(n, count, 20))
    return m.fc(t.mean(1))


def heads_fused(m, x):
    t = tokens(m, x)
    n, count, _ = t.shape
    q, k, v = (layer(t).view(n, count, 4, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.fc((t + m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))).mean(1))


def multihead(m, x):
    t = tokens(m, x)
    return m.fc((t + m.attention(t, t, t, need_weights=False)[0]).mean(1))


def windows(m, x):
    a = m.a(x).permute(0, 2, 3, 1)
    shifted = torch.roll(a, (-2, -2), (1, 2))
    n, h, w, c = shifted.shape
    t = shifted.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    qkv = m.qkv(t).reshape(t.shape[0], 16, 3, 2, 6).permute(2, 0, 3, 1, 4)
    bias = m.table[m.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
    weights = torch.softmax(qkv[0] @ qkv[1].transpose(-2, -1) + bias[None], -1)
    t = m.proj((weights @ qkv[2]).transpose(1, 2).reshape(-1, 16, 12))
    t = t.view(-1, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)
    return m.fc((a + torch.roll(t, (2, 2), (1, 2))).mean((1, 2)))


def cosine_attention(m, x):
    t = tokens(m, x)
    bias = m.bias.clone()
    bias[16:32].zero_()  # Swin v2 has no bias for the keys
    q, k, v = F.linear(t, m.weight, bias).reshape(-1, 64 // 4, 3, 4, 4).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale.exp(), -1)
    return m.fc((t + m.proj((weights @ v).transpose(1, 2).reshape(-1, 16, 16))).mean(1))


def copied(m, x):
    a = m.a(x)
    b = torch.zeros_like(a)
    b[:, 4:].copy_(a[:, :8])
    return end(m, m.b(a + b))


def talking(m, x):
    t = tokens(m, x)
    q, k, v = (layer(t).view(-1, 64, 4, 4) for layer in (m.q, m.k, m.v))
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k), -1)
    return m.fc((t + m.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(-1, 64, 16))).mean(1))


def unbound(m, x):
    first, second = m.a(x).view(-1, 2, 6, 8, 8).unbind(1)
    return end(m, m.b(first * torch.tanh(second)))


def rolled(m, x):
    return end(m, m.b(torch.roll(m.a(x), 2, 1)))


def repeated(m, x):
    return end(m, m.b(m.a(x).repeat(1, 2, 1, 1)) + m.c(m.d(x).repeat_interleave(3, 1)))


def indexed(m, x):
    a = m.a(x)
    return end(m, m.b(a[:, [3, 1, 7, 5, 5]]) + m.c(torch.index_select(a, 1, m.index)))


def gathered(m, x):
    a = m.a(x).flatten(2)
    return end(m, m.b(torch.gather(a, 2, m.order.expand(a.shape[0], 12, 64)).view(-1, 12, 8, 8)))


def over_batch_and_space(m, x):
    both = m.a(torch.cat([x, -x], 0))
    first, second = both.chunk(2, 0)
    return end(m, m.b(torch.cat([first, second], 3)))


def standardized(m, x):
    def weight(layer):
        w = layer.weight
        return (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt() * layer.gain

    a = F.relu(F.conv2d(m.a(x), weight(m.b), m.b.bias, padding=1))
    return end(m, m.c(F.relu(F.conv2d(a, weight(m.g), m.g.bias, padding=1, groups=4))))


def with_gain(layer):
    layer.gain = nn.Parameter(torch.ones(layer.out_channels, 1, 1, 1))
    return layer


def reparameterised(m, x):
    kernel = m.k3.weight + F.pad(m.k1.weight, (1, 1, 1, 1))
    return end(m, m.b(F.relu(F.conv2d(m.a(x), kernel, m.k3.bias + m.k1.bias, padding=1))))


def own_parameters(m, x):
    a = F.conv2d(x, m.kernel, m.shift, padding=1)
    return end(m, m.b(F.relu(a * torch.sigmoid(m.gate) + m.table)))


def channels_gate(m, x):
    a = m.a(x)
    gate = m.eca(a.mean((2, 3))[:, None]).transpose(1, 2).unsqueeze(-1)
    return end(m, m.b(a * torch.sigmoid(gate)))


def evonorm(m, x):
    a = m.a(x)
    n, c, h, w = a.shape
    deviation = (
        a.view(n, 4, c // 4, h, w).var((2, 3, 4), keepdim=True).add(1e-5).sqrt().expand(n, 4, c // 4, h, w).reshape(n, c, h, w)
    )
    return end(m, m.b(a * torch.sigmoid(m.v * a) / deviation))


def constants(m, x):
    a = m.a(x) * torch.linspace(0.5, 1.5, 12).view(12, 1, 1) + torch.tensor([0.1] * 12)[:, None, None]
    return end(m, m.b(F.relu(a - torch.ones(12, 1, 1) * 0.1)))


def positions(m, x):
    t = tokens(m, x)
    frequencies = torch.exp(-torch.arange(0, 16, 2) / 16)
    angles = torch.arange(16)[:, None] * frequencies
    return m.fc((m.mix(t) + torch.cat([angles.sin(), angles.cos()], -1)).mean(1))


class FrozenNorm(nn.Module):
    """Batch norm whose everything is a buffer, as detection backbones have it."""

    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class ChannelsFirstNorm(nn.Module):
    """ConvNeXt's layer norm over channels of (n, c, h, w), written out."""

    def __init__(self, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ChannelsLast(nn.Module):
    """A norm over the last axis, applied to (n, c, h, w)."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(layer):
    return lambda: Net(lambda m, x: end(m, m.b(F.relu(m.n(m.a(x))))), a=conv(3, 12), n=layer, b=conv(12, 8), fc=head(8))


def relative_positions():
    rows = torch.arange(16) // 4
    columns = torch.arange(16) % 4
    return (rows[:, None] - rows + 3) * 7 + (columns[:, None] - columns + 3)


def windowed():
    net = Net(
        windows, a=conv(3, 12), qkv=nn.Linear(12, 36), proj=nn.Linear(12, 12), table=nn.Parameter(torch.rand(49, 2)), fc=head(12)
    )
    net.register_buffer("index", relative_positions())
    return net


def with_buffer(net, **buffers):
    for name, value in buffers.items():
        net.register_buffer(name, value)
    return net


def qkv(features=16):
    return {name: nn.Linear(features, 16) for name in "qkv"}


NETS = {
    "pre-activation": lambda: Net(
        preactivated, stem=conv(3, 8), n1=nn.BatchNorm2d(8), c1=conv(8, 8), n3=nn.BatchNorm2d(8), c2=conv(8, 8),
        n2=nn.BatchNorm2d(8), fc=head(8),
    ),
    "pooled and padded shortcut": lambda: Net(pooled_shortcut, a=conv(3, 8), b=conv(8, 12, stride=2), fc=head(12)),
    "dense block": lambda: Net(dense, stem=conv(3, 8), l0=cbr(8, 4), l1=cbr(12, 4), l2=cbr(16, 4), out=cbr(20, 10), fc=head(10)),
    "concat then add": lambda: Net(concat_then_add, a=conv(3, 5), b=conv(3, 7), c=conv(3, 12), d=conv(12, 8), fc=head(8)),
    "grouped after concat": lambda: Net(
        grouped_after_concat, a=conv(3, 6), b=conv(3, 6), g=conv(12, 8, groups=4), out=conv(8, 6), fc=head(6)
    ),
    "grouped after uneven concat": lambda: Net(
        grouped_after_concat, a=conv(3, 4), b=conv(3, 12), g=conv(16, 8, groups=2), out=conv(8, 6), fc=head(6)
    ),
    "groups of different counts": lambda: Net(
        different_groups, a=conv(3, 24), g4=conv(24, 8, groups=4), g6=conv(24, 12, groups=6), out=conv(20, 6), fc=head(6)
    ),
    "spatial attention": lambda: Net(spatial_attention, a=conv(3, 12), gate=conv(2, 1, 7), b=conv(12, 8), fc=head(8)),
    "space to depth": lambda: Net(space_to_depth, a=conv(3, 6), b=conv(24, 8), fc=head(8)),
    "maxout": lambda: Net(maxout, a=conv(3, 12), b=conv(6, 8), fc=head(8)),
    "lists of parts": lambda: Net(
        python_lists, a=conv(3, 12), blocks=nn.ModuleList([cbr(6, 6), cbr(6, 6)]), out=conv(24, 8), fc=head(8)
    ),
    "C2f": C2f,
    "CSP": lambda: Net(csp, stem=cbr(3, 8), left=cbr(8, 6, 1), block=cbr(6, 6), right=cbr(8, 6, 1), out=cbr(12, 8, 1), fc=head(8)),
    "Res2Net": lambda: Net(res2net, a=conv(3, 12), c0=conv(3, 3), c1=conv(3, 3), c2=conv(3, 3), b=conv(12, 8), fc=head(8)),
    "selective kernel": lambda: Net(
        selective_kernel, k3=cbr(3, 8), k5=cbr(3, 8, 5), down=conv(8, 6, 1), up=conv(6, 16, 1), b=conv(8, 8), fc=head(8)
    ),
    "split attention": lambda: Net(
        split_attention, a=conv(3, 12), down=conv(6, 4, 1), up=conv(4, 12, 1), b=conv(6, 8), fc=head(8)
    ),
    "ghost": lambda: Net(ghost, primary=cbr(3, 8), cheap=cbr(8, 8, groups=8), b=conv(14, 8), fc=head(8)),
    "inception": lambda: Net(
        inception, stem=cbr(3, 8), b1=cbr(8, 4, 1), b3r=cbr(8, 5, 1), b3=cbr(5, 6), pool=cbr(8, 3, 1), out=cbr(13, 8), fc=head(8)
    ),
    "high resolution": lambda: Net(
        high_resolution, high=cbr(3, 8), low=cbr(3, 12, stride=2), up=conv(12, 8, 1), down=conv(8, 12, stride=2),
        out=cbr(20, 8), fc=head(8)
    ),
    "U-Net": lambda: Net(unet, e1=cbr(3, 8), e2=cbr(8, 12), up=nn.ConvTranspose2d(12, 6, 2, 2), d1=cbr(14, 8), fc=head(8)),
    "feature pyramid, shared head": Pyramid,
    "non-local": lambda: Net(
        non_local, a=conv(3, 12), theta=conv(12, 6, 1), phi=conv(12, 6, 1), g=conv(12, 6, 1), out=conv(6, 12, 1),
        b=conv(12, 8), fc=head(8)
    ),
    "attention by hand": lambda: Net(
        heads_by_hand, embed=nn.Conv2d(3, 20, 2, 2), n=nn.LayerNorm(20), qkv=nn.Linear(20, 60), proj=nn.Linear(20, 20), fc=head(20)
    ),
    "attention, fused": lambda: Net(heads_fused, embed=nn.Conv2d(3, 16, 2, 2), **qkv(), proj=nn.Linear(16, 16), fc=head(16)),
    "nn.MultiheadAttention": lambda: Net(
        multihead, embed=nn.Conv2d(3, 16, 2, 2), attention=nn.MultiheadAttention(16, 4, batch_first=True), fc=head(16)
    ),
    "windowed attention": windowed,
    "cosine attention": lambda: Net(
        cosine_attention, embed=nn.Conv2d(3, 16, 2, 2), weight=nn.Parameter(torch.randn(48, 16)),
        bias=nn.Parameter(torch.randn(48)),
        scale=nn.Parameter(torch.rand(4, 1, 1)), proj=nn.Linear(16, 16), fc=head(16),
    ),
    "copied into a slice": lambda: Net(copied, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "einsum": lambda: Net(talking, embed=conv(3, 16), **qkv(), proj=nn.Linear(16, 16), fc=head(16)),
    "unbind": lambda: Net(unbound, a=conv(3, 12), b=conv(6, 8), fc=head(8)),
    "roll": lambda: Net(rolled, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "repeat": lambda: Net(repeated, a=conv(3, 6), d=conv(3, 4), b=conv(12, 8), c=conv(12, 8), fc=head(8)),
    "index by constants": lambda: with_buffer(
        Net(indexed, a=conv(3, 12), b=conv(5, 8), c=conv(4, 8), fc=head(8)), index=torch.tensor([11, 0, 2, 9])
    ),
    "gather by constants": lambda: with_buffer(
        Net(gathered, a=conv(3, 12), b=conv(12, 8), fc=head(8)), order=torch.arange(63, -1, -1).view(1, 1, 64)
    ),
    "concat over batch and space": lambda: Net(over_batch_and_space, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "weight standardisation, grouped": lambda: Net(
        standardized, a=conv(3, 8), b=with_gain(conv(8, 16)), g=with_gain(conv(16, 16, groups=4)), c=conv(16, 8), fc=head(8)
    ),
    "re-parameterised": lambda: Net(reparameterised, a=conv(3, 8), k3=conv(8, 12), k1=conv(8, 12, 1), b=conv(12, 8), fc=head(8)),
    "own parameters": lambda: Net(
        own_parameters, kernel=nn.Parameter(torch.randn(12, 3, 3, 3)), shift=nn.Parameter(torch.randn(12)),
        gate=nn.Parameter(torch.randn(12, 1, 1)), table=nn.Parameter(torch.randn(1, 12, 8, 8)), b=conv(12, 8), fc=head(8),
    ),
    "efficient channel attention": lambda: Net(
        channels_gate, a=conv(3, 12), eca=nn.Conv1d(1, 1, 3, padding=1, bias=False), b=conv(12, 8), fc=head(8)
    ),
    "constants of forward": lambda: Net(constants, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
    "computed positions": lambda: Net(positions, embed=nn.Conv2d(3, 16, 2, 2), mix=nn.Linear(16, 16), fc=head(16)),
    "EvoNorm": lambda: Net(evonorm, a=conv(3, 12), v=nn.Parameter(torch.rand(12, 1, 1)), b=conv(12, 8), fc=head(8)),
    "group norm before a grouped convolution": lambda: Net(
        lambda m, x: end(m, m.b(m.g(m.n(m.a(x))))), a=conv(3, 16), n=nn.GroupNorm(4, 16), g=conv(16, 16, groups=4),
        b=conv(16, 8), fc=head(8)
    ),
    "group norm with one group": norm(nn.GroupNorm(1, 12)),
    "frozen batch norm": norm(FrozenNorm(12)),
    "layer norm, channels last": norm(ChannelsLast(nn.LayerNorm(12))),
    "layer norm, channels first": norm(ChannelsFirstNorm(12)),
    "rms norm": norm(ChannelsLast(nn.RMSNorm(12))),
    "local response norm": norm(nn.LocalResponseNorm(3)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_removed_equals_masked_and_exports(name, tmp_path):
    model = randomize(NETS[name]())
    channels = check_effective(model, (torch.randn(X2),))
    small = compressor.apply(channels.plan(0.5, seed=3), channels.graph, channels=channels)
    compressor.export(small, tmp_path / "small.onnx")
    assert check_onnx(tmp_path / "small.onnx", small) <= PARITY["fp32"]


@pytest.mark.parametrize("name", ["attention by hand", "attention, fused", "nn.MultiheadAttention", "einsum", "windowed attention"])
def test_attention_is_pruned_by_whole_heads(name):
    heads = {"windowed attention": 2}.get(name, 4)
    model = randomize(NETS[name]())
    channels = compressor.analyze(compressor.trace(model, (torch.randn(X2),)))
    assert heads in [group.size for group in channels.free], [(g.name, g.size, g.frozen) for g in channels.groups]


class Inputs(nn.Module):
    """Two inputs that meet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 12), conv(1, 12), conv(12, 8)
        self.fc = head(8)

    def forward(self, image, depth):
        return end(self, self.out(F.relu(self.a(image) + self.b(depth))))


def test_several_inputs():
    check_effective(randomize(Inputs()), (torch.randn(X2), torch.randn(2, 1, 8, 8)))


@dataclass
class Prediction:
    """What a model may return."""

    boxes: torch.Tensor
    scores: torch.Tensor


pytree.register_dataclass(Prediction, serialized_type_name="tests.Prediction")


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass", "nested"])
def test_outputs_of_any_structure_keep_their_shapes(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.boxes, self.scores = cbr(3, 12), conv(12, 4, 1), conv(12, 5, 1)

        def forward(self, x):
            a = self.stem(x)
            boxes, scores = self.boxes(a), self.scores(a)
            return {
                "tuple": (boxes, scores),
                "list": [boxes, scores],
                "dict": {"boxes": boxes, "scores": scores},
                "dataclass": Prediction(boxes, scores),
                "nested": {"all": [(boxes, {"scores": scores})]},
            }[kind]

    model = randomize(Model())
    channels = check_effective(model, (torch.randn(X2),))
    small = compressor.apply(channels.plan(0.5), channels.graph, channels=channels)
    assert pytree.tree_structure(small(torch.randn(X2))) == pytree.tree_structure(model(torch.randn(X2)))


def test_an_inner_feature_that_is_returned_stays_and_the_rest_goes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = cbr(3, 12), cbr(12, 12), conv(12, 4)

        def forward(self, x):
            feature = self.a(x)
            return feature, self.c(self.b(feature))

    channels = check_effective(randomize(Model()), (torch.randn(X2),), most=0.9)
    assert [group.frozen is None for group in channels.groups] == [False, True, False]


def test_parameters_that_do_not_train_are_pruned_and_still_do_not_train():
    model = randomize(
        Net(lambda m, x: end(m, m.b(F.relu(m.n(m.a(x))))), a=conv(3, 12), n=nn.BatchNorm2d(12), b=conv(12, 8), fc=head(8))
    )
    model.a.requires_grad_(False)
    model.n.requires_grad_(False)
    channels = check_effective(model, (torch.randn(X2),))
    small = compressor.apply(channels.plan(0.5), channels.graph, channels=channels)
    trains = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_an_uneven_split_of_an_even_chunk_keeps_what_each_half_keeps():
    model = randomize(
        Net(
            lambda m, x: end(m, torch.cat([m.b(x1) if k else m.c(x1) for k, x1 in enumerate(m.a(x).chunk(2, 1))], 1)),
            a=conv(3, 12), b=conv(6, 4), c=conv(6, 4), fc=head(8),
        )
    )  # fmt: skip
    graph = compressor.trace(model, (torch.randn(X2),))
    channels = compressor.analyze(graph)
    first, second = channels.free[:2]
    plan = compressor.Plan.keep({first.name: [0, 5], second.name: [1, 2, 3, 4]})
    small = compressor.apply(plan, graph, channels=channels)
    (split,) = [node for node in small.graph.nodes if "split" in str(node.target)]
    assert split.args[1] == [2, 4]

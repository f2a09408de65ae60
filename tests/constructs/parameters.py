"""Norms, computed weights, and parameters and constants that a model uses by itself."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.networks import Net, conv, end, head


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


NETS = {
    "weight standardisation, grouped": lambda: Net(
        standardized, a=conv(3, 8), b=with_gain(conv(8, 16)), g=with_gain(conv(16, 16, groups=4)), c=conv(16, 8), fc=head(8)
    ),
    "re-parameterised": lambda: Net(reparameterised, a=conv(3, 8), k3=conv(8, 12), k1=conv(8, 12, 1), b=conv(12, 8), fc=head(8)),
    "own parameters": lambda: Net(
        own_parameters, kernel=nn.Parameter(torch.randn(12, 3, 3, 3)), shift=nn.Parameter(torch.randn(12)),
        gate=nn.Parameter(torch.randn(12, 1, 1)), table=nn.Parameter(torch.randn(1, 12, 8, 8)), b=conv(12, 8), fc=head(8),
    ),
    "constants of forward": lambda: Net(constants, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
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

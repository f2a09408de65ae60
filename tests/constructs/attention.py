"""Attention over channels, over space and by heads."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.networks import Net, cbr, conv, end, head, with_buffer


def spatial_attention(m, x):
    a = m.a(x)
    reduced = torch.cat([a.mean(1, keepdim=True), a.amax(1, keepdim=True)], 1)
    return end(m, m.b(a * torch.sigmoid(m.gate(reduced))))


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


def channels_gate(m, x):
    a = m.a(x)
    gate = m.eca(a.mean((2, 3))[:, None]).transpose(1, 2).unsqueeze(-1)
    return end(m, m.b(a * torch.sigmoid(gate)))


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


def relative_positions():
    rows = torch.arange(16) // 4
    columns = torch.arange(16) % 4
    return (rows[:, None] - rows + 3) * 7 + (columns[:, None] - columns + 3)


def windowed():
    net = Net(
        windows, a=conv(3, 12), qkv=nn.Linear(12, 36), proj=nn.Linear(12, 12), table=nn.Parameter(torch.rand(49, 2)), fc=head(12)
    )
    return with_buffer(net, index=relative_positions())


def cosine_attention(m, x):
    t = tokens(m, x)
    bias = m.bias.clone()
    bias[16:32].zero_()  # Swin v2 has no bias for the keys
    q, k, v = F.linear(t, m.weight, bias).reshape(-1, 64 // 4, 3, 4, 4).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale.exp(), -1)
    return m.fc((t + m.proj((weights @ v).transpose(1, 2).reshape(-1, 16, 16))).mean(1))


def talking(m, x):
    t = tokens(m, x)
    q, k, v = (layer(t).view(-1, 64, 4, 4) for layer in (m.q, m.k, m.v))
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k), -1)
    return m.fc((t + m.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(-1, 64, 16))).mean(1))


def positions(m, x):
    t = tokens(m, x)
    frequencies = torch.exp(-torch.arange(0, 16, 2) / 16)
    angles = torch.arange(16)[:, None] * frequencies
    return m.fc((m.mix(t) + torch.cat([angles.sin(), angles.cos()], -1)).mean(1))


def qkv(features=16):
    return {name: nn.Linear(features, 16) for name in "qkv"}


NETS = {
    "spatial attention": lambda: Net(spatial_attention, a=conv(3, 12), gate=conv(2, 1, 7), b=conv(12, 8), fc=head(8)),
    "selective kernel": lambda: Net(
        selective_kernel, k3=cbr(3, 8), k5=cbr(3, 8, 5), down=conv(8, 6, 1), up=conv(6, 16, 1), b=conv(8, 8), fc=head(8)
    ),
    "split attention": lambda: Net(
        split_attention, a=conv(3, 12), down=conv(6, 4, 1), up=conv(4, 12, 1), b=conv(6, 8), fc=head(8)
    ),
    "efficient channel attention": lambda: Net(
        channels_gate, a=conv(3, 12), eca=nn.Conv1d(1, 1, 3, padding=1, bias=False), b=conv(12, 8), fc=head(8)
    ),
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
    "einsum": lambda: Net(talking, embed=conv(3, 16), **qkv(), proj=nn.Linear(16, 16), fc=head(16)),
    "computed positions": lambda: Net(positions, embed=nn.Conv2d(3, 16, 2, 2), mix=nn.Linear(16, 16), fc=head(16)),
}  # fmt: skip

"""Ops that cut, move and join channels."""

import torch
from torch import nn

from tests.networks import Net, cbr, conv, end, head, with_buffer


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


def copied(m, x):
    a = m.a(x)
    b = torch.zeros_like(a)
    b[:, 4:].copy_(a[:, :8])
    return end(m, m.b(a + b))


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


NETS = {
    "space to depth": lambda: Net(space_to_depth, a=conv(3, 6), b=conv(24, 8), fc=head(8)),
    "maxout": lambda: Net(maxout, a=conv(3, 12), b=conv(6, 8), fc=head(8)),
    "lists of parts": lambda: Net(
        python_lists, a=conv(3, 12), blocks=nn.ModuleList([cbr(6, 6), cbr(6, 6)]), out=conv(24, 8), fc=head(8)
    ),
    "copied into a slice": lambda: Net(copied, a=conv(3, 12), b=conv(12, 8), fc=head(8)),
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
}  # fmt: skip

"""Blocks and whole shapes of convolutional networks: how their layers are wired."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.networks import Net, cbr, conv, end, head


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
    "C2f": C2f,
    "CSP": lambda: Net(csp, stem=cbr(3, 8), left=cbr(8, 6, 1), block=cbr(6, 6), right=cbr(8, 6, 1), out=cbr(12, 8, 1), fc=head(8)),
    "Res2Net": lambda: Net(res2net, a=conv(3, 12), c0=conv(3, 3), c1=conv(3, 3), c2=conv(3, 3), b=conv(12, 8), fc=head(8)),
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
}  # fmt: skip

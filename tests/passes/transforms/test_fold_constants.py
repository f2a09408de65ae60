"""Constants of removed channels: folded = original with removed scales at 0, where that is exact; else named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.tracing.trace import outputs_of
from compressor.passes.transforms.fold_constants import FoldConstants, fold_constants, silenced
from compressor.passes.transforms.verify import relative_error
from tests.networks import Net, conv, head, randomize

X = (torch.randn(2, 3, 8, 8),)


def block(reader, after=None, pool=False):
    """conv, batch norm with shifts that matter, activation, a reader."""

    def forward(m, x):
        a = F.silu(m.n(m.a(x)))
        a = F.avg_pool2d(a, 2) if pool else a
        return m.fc(F.relu(m.after(m.reader(a))).flatten(2).mean(-1))

    return Net(forward, a=conv(3, 12), n=nn.BatchNorm2d(12), reader=reader, after=after or nn.Identity(), fc=head(8))


def apply_and_fold(model, ratio=0.5):
    channels = compressor.analyze(compressor.trace(randomize(model), X))
    free = {group.name: group for group in channels.free}
    plan = compressor.Plan.keep({"a": list(range(round(free["a"].size * (1 - ratio))))}, channels.digest)
    small = compressor.apply(plan, channels.graph).eval()
    return channels, plan, small


def error(channels, plan, graph):
    with torch.no_grad():
        return relative_error(outputs_of(graph(*X)), outputs_of(silenced(channels, plan)(*X)))


EXACT = {
    "1x1 with bias": lambda: block(conv(12, 8, 1)),
    "3x3 without padding": lambda: block(nn.Conv2d(12, 8, 3, bias=False)),
    "without bias before a batch norm": lambda: block(nn.Conv2d(12, 8, 3, bias=False), nn.BatchNorm2d(8)),
    "dilated": lambda: block(nn.Conv2d(12, 8, 3, dilation=2)),
    "replicated padding": lambda: block(nn.Conv2d(12, 8, 3, padding=1, padding_mode="replicate")),
    "after a pool": lambda: block(conv(12, 8, 1), pool=True),
    "strided": lambda: block(nn.Conv2d(12, 8, 2, stride=2)),
}


@pytest.mark.parametrize("name", EXACT)
def test_folded_equals_the_original_with_removed_scales_at_zero(name):
    channels, plan, small = apply_and_fold(EXACT[name]())
    assert error(channels, plan, small) > 1e-3, "the constants do not matter here, the test could not fail"
    before = {key: value.clone() for key, value in small.state_dict().items()}
    folding = fold_constants(channels, plan, small)
    assert folding.folded == ("reader",)
    assert not folding.skipped
    assert error(channels, plan, folding.graph) < 1e-5
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items()), "the argument was changed"
    assert FoldConstants(plan, channels)(small).modified


def test_a_zero_padding_is_not_exact_and_named():
    channels, plan, small = apply_and_fold(block(conv(12, 8, 3)))
    folding = fold_constants(channels, plan, small)
    assert folding.folded == ()
    assert "zero padding sees a border" in folding.skipped["reader"]
    assert not FoldConstants(plan, channels)(small).modified


def test_channels_that_are_not_constant_are_named():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = conv(3, 12), conv(3, 12), nn.BatchNorm2d(12)
            self.reader, self.fc = conv(12, 8, 1), head(8)

        def forward(self, x):
            return self.fc(self.reader(self.a(x) + self.n(self.b(x))).mean((2, 3)))

    channels, plan, small = apply_and_fold(Residual())
    assert "6 of the 6 removed channels that it reads are not constant" in fold_constants(channels, plan, small).skipped["reader"]


def test_a_linear_layer_behind_flattened_positions_takes_all_of_them():
    model = Net(
        lambda m, x: m.reader(F.relu(m.n(m.a(x))).flatten(1)), a=conv(3, 12), n=nn.BatchNorm2d(12), reader=nn.Linear(12 * 64, 5)
    )
    channels, plan, small = apply_and_fold(model)
    folding = fold_constants(channels, plan, small)
    assert folding.folded == ("reader",)
    assert error(channels, plan, folding.graph) < 1e-5

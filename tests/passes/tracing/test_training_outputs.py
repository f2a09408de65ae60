"""Models whose outputs in training mode are others."""

import torch
from torch import nn

from compressor.passes.tracing.training_outputs import other_in_training


class Detects(nn.Module):
    def __init__(self, same=False):
        super().__init__()
        self.conv, self.norm, self.same = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), same

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y if self.same or not self.training else {"raw": y, "sum": y.sum(1)}


def test_other_outputs_are_told_and_the_model_is_as_it_was():
    model = Detects().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = other_in_training(model, (torch.randn(2, 1, 8, 8),))
    assert "a dict of (4, 4, 6, 6), (4, 6, 6), in eval mode (4, 4, 6, 6)" in said
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_nothing_is_said_of_the_same_outputs_or_of_models_that_want_targets():
    class Wants(nn.Module):
        def forward(self, x, targets=None):
            assert not self.training or targets is not None
            return x

    x = (torch.randn(2, 1, 8, 8),)
    assert other_in_training(Detects(same=True), x) is None
    assert other_in_training(Wants(), x) is None

"""Small networks and the oracle, shared by the tests of passes."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor.passes.verify import relative_error, run_masked

TOLERANCE = 1e-4  # float32: see compressor.passes.verify.TOLERANCE


def randomize(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts away from 0 and 1, so that nothing is right by luck."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean") or (name.endswith("bias") and tensor.is_floating_point()):
                tensor.normal_(0, 0.1, generator=generator)
            elif name.endswith(("layer_scale", "gamma")) or (name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def check(model: nn.Module, inputs, ratio: float, seed: int | None, *, zeroed: bool = True):
    """Removed = masked, by two oracles: masks in front of every reader, and zeroed slices of the user's own model."""
    graph = compressor.trace(model, inputs)
    channels = compressor.analyze(graph)
    plan = channels.plan(ratio, seed=seed)
    before = copy.deepcopy(graph.state_dict())
    small = compressor.apply(plan, graph, channels=channels)
    assert all(torch.equal(before[k], v) for k, v in graph.state_dict().items()), "apply changed its argument"
    with torch.no_grad():
        found = small.eval()(*inputs)
    assert relative_error([found], run_masked(channels, plan, inputs)) < TOLERANCE
    assert graph.meta["compressor.dynamic_batch"]
    three = tuple(torch.randn(3, *x.shape[1:]) for x in inputs)
    with torch.no_grad():
        assert relative_error([small(*three)], run_masked(channels, plan, three)) < TOLERANCE
    if zeroed:
        twin = copy.deepcopy(model).eval()
        tensors = twin.state_dict()
        for name, axis, removed in channels.slices(plan):
            tensors[name].index_fill_(axis, torch.tensor(removed), 0)
        with torch.no_grad():
            assert relative_error([found], [twin(*inputs)]) < TOLERANCE
    costs = channels.costs(channels.widths([channels.structure(plan)]))
    assert costs.params[0] == sum(p.numel() for p in small.parameters())
    again = compressor.analyze(small)
    assert again.costs(again.widths([again.full])).macs[0] == costs.macs[0]
    return channels, plan, small


class Residual(nn.Module):
    """Stem, one residual block, linear head."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.drop(x.mean((2, 3))))

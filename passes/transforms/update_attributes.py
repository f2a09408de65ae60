"""After its tensors were narrowed, a module's attributes say so: channels, groups, features."""

from collections.abc import Callable, Mapping
from typing import cast

from torch import nn


def _fit_conv(module: nn.Module) -> None:
    conv = cast(nn.Conv2d, module)
    own = conv.weight.shape
    if conv.groups > 1 and conv.in_channels == conv.groups:  # depthwise: as many groups as inputs are left
        multiplier = conv.out_channels // conv.groups
        conv.groups = own[0] // multiplier
    conv.out_channels, conv.in_channels = own[0], own[1] * conv.groups


def _fit_transposed(module: nn.Module) -> None:
    conv = cast(nn.ConvTranspose2d, module)
    own = conv.weight.shape
    if conv.groups > 1 and conv.in_channels == conv.groups:
        conv.groups = own[0]
    conv.in_channels, conv.out_channels = own[0], own[1] * conv.groups


def _fit_linear(module: nn.Module) -> None:
    linear = cast(nn.Linear, module)
    linear.out_features, linear.in_features = linear.weight.shape


def _fit_features(module: nn.Module) -> None:
    norm = cast(nn.BatchNorm2d, module)
    tensor = next(t for t in (norm.weight, norm.running_mean) if t is not None)
    norm.num_features = tensor.shape[0]


def _fit_layer_norm(module: nn.Module) -> None:
    norm = cast(nn.LayerNorm, module)
    norm.normalized_shape = tuple(norm.weight.shape)


def _fit_group_norm(module: nn.Module) -> None:
    norm = cast(nn.GroupNorm, module)
    per_block = norm.num_channels // norm.num_groups
    norm.num_channels = norm.weight.shape[0]
    if norm.num_groups > 1:  # as if whole blocks had gone; an edit corrects it where they have shrunk
        norm.num_groups = max(norm.num_channels // per_block, 1)


_FIT: Mapping[type[nn.Module], Callable[[nn.Module], None]] = {
    nn.Conv1d: _fit_conv,
    nn.Conv2d: _fit_conv,
    nn.Conv3d: _fit_conv,
    nn.ConvTranspose1d: _fit_transposed,
    nn.ConvTranspose2d: _fit_transposed,
    nn.ConvTranspose3d: _fit_transposed,
    nn.Linear: _fit_linear,
    nn.BatchNorm1d: _fit_features,
    nn.BatchNorm2d: _fit_features,
    nn.BatchNorm3d: _fit_features,
    nn.InstanceNorm1d: _fit_features,
    nn.InstanceNorm2d: _fit_features,
    nn.InstanceNorm3d: _fit_features,
    nn.LayerNorm: _fit_layer_norm,
    nn.GroupNorm: _fit_group_norm,
}


def fit(module: nn.Module) -> None:
    """Make a module's attributes (`out_channels`, `num_features`, …) say what its tensors are."""
    for kind, function in _FIT.items():
        if isinstance(module, kind):
            function(module)
            return

"""Weights that are computed from others (weight norm, spectral norm, any parametrization), folded into plain ones before tracing.

What is pruned are the rows and columns of a stored weight; the two factors of a weight norm have none of their own. A copy of the
model with plain weights computes the same, exports to less, and trains on without the parametrization.
"""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressor.passes.tracing.modes import eval_mode


def reparametrized(model: nn.Module) -> list[str]:
    """Names of the tensors that a model computes from others at every call."""
    found = []
    for path, module in model.named_modules():
        own = list(module.parametrizations) if parametrize.is_parametrized(module) else []
        own += [hook.name for hook in _hooks(module)]
        found += [f"{path}.{name}".lstrip(".") for name in own]
    return found


def with_plain_weights(model: nn.Module) -> nn.Module:
    """A copy whose weights are stored as what they come to in eval mode; `model` itself where it computes none.

    Its `state_dict` has `weight` where that of `model` has `weight_g` and `weight_v`, or what a parametrization has instead.
    """
    if not reparametrized(model):
        return model
    modes = {path: module.training for path, module in model.named_modules()}
    with eval_mode(model), torch.no_grad():
        for module in model.modules():
            for hook in _hooks(module):  # else the last call's weight, with its history, which cannot be copied
                hook(module, None)
        copied = copy.deepcopy(model)
        for module in copied.modules():
            for hook in _hooks(module):
                remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
                remove(module, hook.name)
            if parametrize.is_parametrized(module):
                _make_plain(module)
    for path, module in copied.named_modules():
        module.training = modes[path]
    return copied


def _make_plain(module: nn.Module) -> None:
    """As `remove_parametrizations`, which would change the class of the module that this is a copy of: they share it."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value))


def _hooks(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm)]

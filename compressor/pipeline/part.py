"""A part of a model: one submodule is traced and compressed; what is judged and trained is the model with it in its place."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import TraceError
from compressor.passes.tracing.trace import device_of


class Part:
    """One submodule of a model.

    Args:
        model: The whole; it is copied.
        name: Of the submodule, such as `backbone`.
        example_inputs: Of the whole model.

    Raises:
        TraceError: There is no such submodule, it is not called once with tensors alone, or the model does not run.
    """

    def __init__(self, model: nn.Module, name: str, example_inputs: Sequence[Tensor]) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        try:
            self.module = self._model.get_submodule(name)
        except AttributeError as error:
            known = ", ".join(own for own, _ in model.named_children())
            raise TraceError(f"part={name!r}: the model has no such submodule; its own are {known or 'none'}") from error
        owners = [(owner, key) for owner in self._model.modules() for key, own in owner._modules.items() if own is self.module]
        self.name, self._places = name, owners  # it may be registered under several names
        self.names = tuple(inspect.signature(model.forward).parameters)[: len(example_inputs)]
        self.example_inputs = self.inputs(example_inputs)
        self.module.requires_grad_(True)

    def inputs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the submodule is called with when the model is called."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = self.module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((_copied(args), kwargs)), with_kwargs=True
        )
        self(self.module)
        try:
            with torch.no_grad():
                self._model(*[x.to(device_of(self._model)) for x in inputs])
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            said = f"the model does not run on these inputs: {type(error).__name__}: {line}"
            raise TraceError(f"part={self.name!r}: {said}") from error
        finally:
            hook.remove()
        if len(calls) != 1:
            raise TraceError(f"part={self.name!r} is called {len(calls)} times in a forward pass; a part must be called once")
        args, kwargs = calls[0]
        if kwargs or not args or not all(isinstance(x, Tensor) for x in args):
            kinds = ", ".join([*(type(x).__name__ for x in args), *(f"{key}=" for key in kwargs)])
            raise TraceError(f"part={self.name!r} is called with ({kinds}); a part must be called with tensors alone")
        return args

    def recorded(self, batches: Iterable[object]) -> Iterator[tuple[Tensor, ...]]:
        """The submodule's inputs for batches of the model's inputs."""
        for batch in batches:
            yield tuple(x.cpu() for x in self.inputs(batch if isinstance(batch, tuple | list) else (batch,)))

    def __call__(self, graph: nn.Module) -> nn.Module:
        """The model with a network in the submodule's place, until the next call."""
        for owner, key in self._places:
            owner._modules[key] = graph
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        """With the original in its place: graphs travel otherwise."""
        self(self.module)
        return self.__dict__


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """As they are now: the part may write to them."""
    return tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)

"""`Prefix`: a network run part by part over fixed batches; every node runs once per batch, however often it stops.

What later nodes still read is kept between two stops: in memory up to a budget, beyond it in files that the system
may write out. So a search that decides layer after layer costs as many forward passes as one, and an evaluation of a
candidate begins where the decided part ends.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.call_arguments import written_by
from compressor.passes.tracing.trace import device_of


class Shelf:
    """Keeps tensors, in memory up to a budget.

    Args:
        budget_bytes: Of everything it keeps in memory at one time; no limit by default.
    """

    def __init__(self, budget_bytes: int = 1 << 62) -> None:
        self._left = budget_bytes

    def keep(self, x: Tensor) -> Tensor:
        """The tensor itself, or one of equal content whose memory is a file."""
        size = x.numel() * x.element_size()
        if size <= self._left or x.device.type != "cpu" or not size:
            self._left -= size
            weakref.finalize(x, self._back, size)
            return x
        handle, name = tempfile.mkstemp(prefix="compressor-")
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            os.unlink(name)
            raise DataError(f"no room for {size >> 20} MiB of activations in {tempfile.gettempdir()}: {error.strerror}") from error
        finally:
            os.close(handle)
        try:
            copy = torch.from_file(name, shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)
        finally:
            os.unlink(name)  # the mapping lives on, and nothing is left behind whatever happens
        return copy.copy_(x)

    def _back(self, size: int) -> None:
        self._left += size


class Prefix:
    """See the module.

    Args:
        graph: A traced graph in eval mode; its modules may be changed as long as they have not run.
        calibration: What it runs on.
        shelf: Keeps the activations.
    """

    def __init__(self, graph: fx.GraphModule, calibration: Calibration, shelf: Shelf) -> None:
        self.graph = graph
        self._shelf = shelf
        self._index(graph)
        self._cursor = 0
        self._interpreter = fx.Interpreter(graph, garbage_collect_values=False)
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._environments: list[dict[fx.Node, Any]] = [
            dict(zip(inputs, (x.to(device_of(graph)) for x in batch), strict=True)) for batch in calibration.batches
        ]

    def _index(self, graph: fx.GraphModule) -> None:
        self._nodes = list(graph.graph.nodes)
        self._position = {node.name: k for k, node in enumerate(self._nodes)}
        self._last_use: dict[int, list[fx.Node]] = {}
        for node in self._nodes:
            last = max((self._position[user.name] for user in node.users), default=self._position[node.name])
            self._last_use.setdefault(last, []).append(node)

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._environments)

    def fork(self, graph: fx.GraphModule | None = None) -> "Prefix":
        """A second runner that starts here; this one does not notice what the other does.

        Args:
            graph: A graph to go on with, whose nodes have the names of this one's; parameters that this one has
                fetched already are fetched anew.
        """
        twin = object.__new__(Prefix)
        twin.__dict__ = {**vars(self), "_environments": [dict(own) for own in self._environments]}
        if graph is None or graph is self.graph:
            return twin
        twin.graph, twin._interpreter = graph, fx.Interpreter(graph, garbage_collect_values=False)
        twin._index(graph)
        nodes = {node.name: node for node in twin._nodes}
        twin._environments = [{nodes[node.name]: value for node, value in own.items()} for own in self._environments]
        for environment in twin._environments:
            for node in [node for node in environment if node.op == "get_attr"]:
                environment[node] = twin._interpreter.run_node(node)
        return twin

    def passed(self, name: str) -> bool:
        """Whether a node has run."""
        return self._position[name] < self._cursor

    def before(self, name: str) -> None:
        """Run every batch up to a node, which does not run yet; nothing happens where that is done already."""
        self._run(self._position[name])

    def through(self, name: str) -> None:
        """Run every batch up to a node and through it."""
        self._run(self._position[name] + 1)

    def finish(self) -> Iterator[Any]:
        """Run to the end; the output of each batch, as the graph returns it."""
        self._run(len(self._nodes) - 1)
        output = self._nodes[-1]
        for environment in self._environments:
            yield output.graph.process_outputs(fx.node.map_arg(output.args[0], environment.__getitem__))

    def value(self, name: str, batch: int) -> Any:
        """What a node gave for a batch; it must have run, and something that has not run must still read it."""
        return self._environments[batch][self._nodes[self._position[name]]]

    def has(self, name: str) -> bool:
        """Whether a node's value is there."""
        return bool(self._environments) and self._nodes[self._position[name]] in self._environments[0]

    def _run(self, stop: int) -> None:
        if stop <= self._cursor:
            return
        with torch.no_grad():
            for environment in self._environments:
                self._interpreter.env = environment
                for k in range(self._cursor, stop):
                    self._step(k, environment)
                for node, value in environment.items():
                    new = self._position[node.name] >= self._cursor and node.op not in ("placeholder", "get_attr")
                    if isinstance(value, Tensor) and new:
                        environment[node] = self._shelf.keep(value)
        self._interpreter.env = {}
        self._cursor = stop

    def _step(self, k: int, environment: dict[fx.Node, Any]) -> None:
        node = self._nodes[k]
        for changed in written_by(node):  # by this op: not the images, and not what a fork still needs
            environment[changed] = environment[changed].clone()
        if node.op != "placeholder":
            environment[node] = self._interpreter.run_node(node)
        for dead in self._last_use.get(k, ()):
            if dead.op != "output":
                environment.pop(dead, None)

"""`Original`: what the original network gives where layers of narrowed ones are fitted to it, as it runs, or remembered.

Only some positions of each output are looked at, the same ones for every network. Who fits many narrowed networks on the
same images (a search, a comparison) lets them be `remembered`: the original then runs once, not once for each.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader, readers_of
from compressor.passes.layers.product import Product, sample
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import generator_of
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.modes import eval_mode
from compressor.passes.tracing.shapes import shapes_of


@dataclass(frozen=True, eq=False)
class Shown:
    """What a layer of the original shows for one batch.

    Attributes:
        at: (positions, axes): where.
        output: (images x positions, outputs).
        shortcut: (images x positions, outputs): what is added behind it, where something is and has been computed by then.
        target: (images x positions, outputs): of another node of that shape, where one was asked for.
    """

    at: Tensor
    output: Tensor
    shortcut: Tensor | None
    target: Tensor | None = None


class Original:
    """The original network, run as far as it is looked at; what it shows on the way is kept until it is asked for.

    Args:
        channels: The analysis of the original network, in eval mode.
        calibration: Images.
        positions: Of each image and layer, at most.
        seed: Of the positions.
        shelf: Keeps activations.
        targets: Nodes that may be asked for as targets.
    """

    def __init__(
        self,
        channels: ChannelGraph,
        calibration: Calibration,
        positions: int,
        seed: int,
        shelf: Shelf,
        targets: Collection[str] = (),
    ) -> None:
        self._graph, self._positions, self._seed, self._shelf = channels.graph, positions, seed, shelf
        self._batches = len(calibration.batches)
        self._prefix = Prefix(self._graph, calibration, shelf)
        self._readers = readers_of(channels)
        self._nodes = {node.name: node for node in self._graph.graph.nodes}
        self._place = {name: k for k, name in enumerate(self._nodes)}
        self._stops = sorted({*self._readers, *targets}, key=self._place.__getitem__)
        self._known: dict[tuple[str, int], Shown] = {}
        self._targets: dict[tuple[str, int, int], Tensor] = {}

    def through(self, reader: Reader, target: str | None = None) -> None:
        """Run every batch through a layer, and as far as a target; layers are asked for in the order of the graph."""
        self._forget(reader)
        last = max(self._place[name] for name in (reader.node, target) if name)
        while self._stops and self._place[self._stops[0]] <= last:
            self._stop(self._stops.pop(0))

    def shown(self, reader: Reader, batch: int, target: str | None = None) -> Shown:
        """What it shows, once it has been run through.

        Args:
            reader: The layer.
            batch: Number of the batch.
            target: One of the `targets`, of the shape of the layer's output.
        """
        found = self._known[reader.node, batch]
        if target is None:
            return found
        axis = Product(self._graph.get_submodule(reader.layer)).channel_axis
        return replace(found, target=self._targets[target, axis, batch])

    def _forget(self, reader: Reader) -> None:
        """What lies in front of a layer will not be asked for any more."""
        place = self._place[reader.node]
        self._known = {key: own for key, own in self._known.items() if self._place[key[0]] >= place}
        self._targets = {key: own for key, own in self._targets.items() if self._place[key[0]] >= place}

    def _stop(self, name: str) -> None:
        self._prefix.through(name)
        if name in self._readers:
            for batch in range(self._batches):
                self._known[name, batch] = self._seen(self._readers[name], batch)
            return
        products: dict[int, Product] = {}  # one for every way in which channels of that shape may lie
        for reader in self._readers.values():
            if shapes_of(self._nodes[reader.node]) == shapes_of(self._nodes[name]):
                product = Product(self._graph.get_submodule(reader.layer))
                products.setdefault(product.channel_axis, product)
        for axis, product in products.items():
            for batch in range(self._batches):
                value = self._prefix.value(name, batch)
                self._targets[name, axis, batch] = self._shelf.keep(product.values(value, self._at(product, value, batch)))

    def _at(self, product: Product, output: Tensor, batch: int) -> Tensor:
        """Positions of an output; equal ones for outputs of one shape."""
        return sample(product.grid(output.shape), self._positions, generator_of(self._seed, batch))  # axis 0 need not be the batch

    def _seen(self, reader: Reader, batch: int) -> Shown:
        product = Product(self._graph.get_submodule(reader.layer))
        output = self._prefix.value(reader.node, batch)
        at = self._at(product, output, batch)
        there = reader.shortcut is not None and self._prefix.has(reader.shortcut)
        shortcut = self._shelf.keep(product.values(self._prefix.value(str(reader.shortcut), batch), at)) if there else None
        return Shown(at, self._shelf.keep(product.values(output, at)), shortcut)


class Remembered(Original):
    """The same, of all layers and of all that may become a target, run once.

    Args:
        channels: The analysis of the original network.
        calibration: Images.
        positions: Of each image and layer, at most.
        seed: Of the positions.
        memory_mb: For what is remembered before it goes to files, and for activations on the way.
    """

    def __init__(self, channels: ChannelGraph, calibration: Calibration, positions: int, seed: int, memory_mb: int) -> None:
        targets = {branch.at for branch in channels.branches}
        super().__init__(channels, calibration, positions, seed, Shelf(memory_mb << 20), targets)
        with eval_mode(channels.graph):
            for name in self._stops:
                self._stop(name)
        self._stops = []
        del self._prefix

    def _forget(self, reader: Reader) -> None:
        """Everything is remembered."""

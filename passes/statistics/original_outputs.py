"""`Original`: what the original network gives where layers of narrowed ones are fitted to it, as it runs, or remembered.

Only some positions of each output are looked at, the same ones for every network. Who fits many narrowed networks on the
same images (a search, a comparison) lets them be `remembered`: the original then runs once, not once for each.
"""

from dataclasses import dataclass, replace

from torch import Tensor, fx

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.readers import Reader, readers_of
from compressor.passes.layers.product import Product, sample
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import generator_of
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.modes import eval_mode


@dataclass(frozen=True, eq=False)
class Shown:
    """What a layer of the original shows for one batch.

    Attributes:
        at: (positions, axes): where.
        output: (images x positions, outputs).
        shortcut: (images x positions, outputs): what is added behind it, where something is and has been computed by then.
    """

    at: Tensor
    output: Tensor
    shortcut: Tensor | None


class Original:
    """The original network, run as far as it is looked at.

    Args:
        graph: In eval mode.
        calibration: Images.
        positions: Of each image and layer, at most.
        seed: Of the positions.
        shelf: Keeps activations.
    """

    def __init__(self, graph: fx.GraphModule, calibration: Calibration, positions: int, seed: int, shelf: Shelf) -> None:
        self._graph, self._positions, self._seed = graph, positions, seed
        self._prefix = Prefix(graph, calibration, shelf)

    def through(self, reader: Reader) -> None:
        """Run every batch through a layer; layers are asked for in the order of the graph."""
        self._prefix.through(reader.node)

    def shown(self, reader: Reader, batch: int) -> Shown:
        """What it shows; it is the last that was run."""
        product = Product(self._graph.get_submodule(reader.layer))
        output = self._prefix.value(reader.node, batch)
        at = sample(product.grid(output.shape), self._positions, generator_of(self._seed, batch))  # axis 0 need not be the batch
        there = reader.shortcut is not None and self._prefix.has(reader.shortcut)
        shortcut = product.values(self._prefix.value(str(reader.shortcut), batch), at) if there else None
        return Shown(at, product.values(output, at), shortcut)


class Remembered(Original):
    """The same, of all layers, run once.

    Args:
        channels: The analysis of the original network.
        calibration: Images.
        positions: Of each image and layer, at most.
        seed: Of the positions.
        memory_mb: For what is remembered before it goes to files, and for activations on the way.
    """

    def __init__(self, channels: ChannelGraph, calibration: Calibration, positions: int, seed: int, memory_mb: int) -> None:
        super().__init__(channels.graph, calibration, positions, seed, Shelf(memory_mb << 20))
        shelf = Shelf(memory_mb << 20)
        self._known: dict[tuple[str, int], Shown] = {}
        with eval_mode(channels.graph):
            for reader in readers_of(channels).values():
                super().through(reader)
                for batch in range(len(calibration.batches)):
                    found = super().shown(reader, batch)
                    shortcut = None if found.shortcut is None else shelf.keep(found.shortcut)
                    self._known[reader.node, batch] = replace(found, output=shelf.keep(found.output), shortcut=shortcut)
        del self._prefix

    def through(self, reader: Reader) -> None:
        """Nothing is left to run."""

    def shown(self, reader: Reader, batch: int) -> Shown:
        """What it showed."""
        return self._known[reader.node, batch]

"""Statistics of what layers read: mean and covariance of their patches, in float64, from one pass over some images.

Several layers are served by one forward pass, as many as their matrices fit into the memory that may be used; then
comes the next pass. A layer whose own matrix is too large is cut into parts of its columns, whose covariance with each other
is left out: compensation then repairs within each part.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.passes.layers.product import Product, sample
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.moments import Moments
from compressor.passes.statistics.partial_run import Prefix, Shelf
from compressor.passes.tracing.shapes import shapes_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Some columns of a layer, and their moments.

    Attributes:
        columns: The range within each block.
        mean: (blocks, columns).
        covariance: (blocks, columns, columns).
    """

    columns: slice
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Statistics:
    """Of one layer.

    Attributes:
        samples: How many patches were looked at.
        parts: One, or several where the memory did not suffice for the whole.
    """

    samples: int
    parts: tuple[Part, ...]


def parts_of(product: Product, memory_bytes: int) -> tuple[slice, ...]:
    """Ranges of a layer's columns, of whole channels, whose covariances fit into the memory; grouped layers are not cut."""
    channels = product.inputs if product.blocks == 1 else 1
    count = 1
    while count < channels and _needed(product, -(-channels // count) * product.kernel, count) > memory_bytes:
        count += 1
    size = -(-channels // count) * product.kernel if product.blocks == 1 else product.columns
    return tuple(slice(start, min(start + size, product.columns)) for start in range(0, product.columns, size))


def _needed(product: Product, columns: int, parts: int) -> int:
    """All parts are kept while they are collected, and one at a time is factored."""
    return max(matrix_bytes(product, columns), parts * matrix_bytes(product, columns) // 4)


def matrix_bytes(product: Product, columns: int) -> int:
    """Memory of a covariance over so many columns of each block, and of the factors that are made of it."""
    return 4 * 8 * product.blocks * columns * columns


def collect(
    graph: fx.GraphModule,
    nodes: Sequence[str],
    calibration: Calibration,
    positions: int = 32,
    memory_bytes: int = 1 << 30,
    seed: int = 0,
) -> dict[str, Statistics]:
    """Statistics of the inputs of some layers.

    Args:
        graph: A traced graph in eval mode; it is only run.
        nodes: Names of nodes that call a `Product`, in the order of the graph.
        calibration: The images.
        positions: How many positions of each image are sampled at most.
        memory_bytes: For the matrices of the layers that share a pass.
        seed: Of the positions.

    Raises:
        DataError: The features of a batch hold NaN or infinity; batch and layer are named.
    """
    found: dict[str, Statistics] = {}
    for names in _passes(graph, nodes, memory_bytes):
        found.update(_one_pass(graph, names, calibration, positions, memory_bytes, seed))
    return found


def _passes(graph: fx.GraphModule, nodes: Sequence[str], memory_bytes: int) -> list[list[str]]:
    """Layers that share a forward pass."""
    passes: list[list[str]] = []
    used = memory_bytes + 1
    for name, product in _products(graph, nodes).items():
        parts = parts_of(product, memory_bytes)
        size = sum(matrix_bytes(product, part.stop - part.start) for part in parts) // 4
        if used + size > memory_bytes:
            passes.append([])
            used = 0
        passes[-1].append(name)
        used += size
    if len(passes) > 1:
        logger.info("statistics: %d forward passes for %d layers within the memory", len(passes), len(nodes))
    return passes


def _products(graph: fx.GraphModule, nodes: Sequence[str]) -> dict[str, Product]:
    targets = {node.name: str(node.target) for node in graph.graph.nodes}
    return {name: Product(graph.get_submodule(targets[name])) for name in nodes}


def _one_pass(
    graph: fx.GraphModule, names: Sequence[str], calibration: Calibration, positions: int, memory_bytes: int, seed: int
) -> dict[str, Statistics]:
    products = _products(graph, names)
    columns = {name: parts_of(product, memory_bytes) for name, product in products.items()}
    moments = {name: [Moments() for _ in own] for name, own in columns.items()}
    nodes = {node.name: node for node in graph.graph.nodes if node.name in products}
    for k, batch in enumerate(calibration.batches):
        prefix = Prefix(graph, Calibration((batch,)), Shelf())
        for name, product in products.items():
            prefix.before(name)
            x = prefix.value(nodes[name].all_input_nodes[0].name, 0)
            check_finite(x, k, f"input of `{name}`")
            grid = tuple(x.shape[1:-1]) if product.channel_axis == -1 else product.grid(shapes_of(nodes[name])[0])
            at = sample(grid, positions, generator_of(seed, k))
            for images in torch.split(x, product.portion(len(at), memory_bytes)):
                patches = product.patches(images, at)
                for part, own in zip(columns[name], moments[name], strict=True):
                    own.add(patches[:, :, part])
    return {
        name: Statistics(own[0].count, tuple(Part(part, m.mean, m.covariance) for part, m in zip(columns[name], own, strict=True)))
        for name, own in moments.items()
    }


def generator_of(seed: int, batch: int) -> torch.Generator:
    """Of the positions of a batch: the same in every pass, so that networks can be compared position by position."""
    return torch.Generator().manual_seed(seed * 1_000_003 + batch)


def check_finite(x: Tensor, batch: int, place: str) -> None:
    """Raise `DataError` where features are not finite."""
    # a sum is finite only if all that is summed is, and takes a fraction of the time; it may overflow where nothing is wrong
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        raise DataError(f"calibration: batch {batch} gives NaN or infinity at the {place}")

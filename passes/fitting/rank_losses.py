"""What lower ranks lose: for every layer that may become a sequence the loss at each rank, as `losses.py` has it for channels.

With the eigenvalues e of the covariance of the layer's output behind its norm, the layer of rank r that loses least leaves

    J(r) = e_{r+1} + e_{r+2} + …        (rank_reduction.py)

which is in the same units as the loss of removed channels: an error behind the norm.
"""

from collections.abc import Sequence

import numpy as np
import torch

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.rank_axes import RankAxis
from compressor.passes.channels.readers import Reader, affine, readers_of
from compressor.passes.fitting.compensated_ranking import Ranking
from compressor.passes.fitting.losses import PROBE, Curve, Divergences, sensitivity, statistics_by_group
from compressor.passes.fitting.rank_reduction import energies, reduced
from compressor.passes.fitting.settings import Compensation
from compressor.passes.layers.factorizable import sizes_of
from compressor.passes.layers.product import Product
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.statistics.collect import Statistics
from compressor.passes.statistics.distances import Distance, default_distance
from compressor.passes.tracing.trace import quiet_deepcopy
from compressor.values.plan import Factorization


def rank_curves(
    channels: ChannelGraph,
    axes: Sequence[RankAxis],
    calibration: Calibration,
    settings: Compensation,
    probes: int = 256,
    seed: int = 0,
    distance: Distance | None = None,
) -> dict[str, Curve]:
    """Loss and sensitivity of the ranks of layers.

    Args:
        channels: The analysis of the network, in eval mode.
        axes: Of the layers.
        calibration: Images.
        settings: Of compensation: images, positions and memory.
        probes: Images that sensitivities are measured on; 0 for none.
        seed: Of the sampled positions.
        distance: How the network's outputs are compared; by what they look like if None.

    Returns:
        Name of each axis whose layer is called once -> its curve.
    """
    readers = {reader.layer: reader for reader in readers_of(channels).values()}
    known = {axis.name: (axis, readers[axis.layer]) for axis in axes if axis.layer in readers}
    by = distance or default_distance(channels.graph)
    probe = _Probe(channels, calibration.first(probes), settings, by) if probes and known else None
    asked = {name: [reader] for name, (_, reader) in known.items()}
    curves = {}
    for name, statistics in statistics_by_group(channels, asked, calibration, settings, seed):
        axis, reader = known[name]
        own = statistics[reader.node]
        product = Product(channels.graph.get_submodule(reader.layer))
        scale = affine(channels.graph, reader.norm, product.outputs)[0].reshape(1, -1)
        values = _energies(product, own, scale)
        loss = np.concatenate([values[::-1].cumsum()[::-1], np.zeros(axis.size + 1 - len(values))])
        ranking = Ranking(np.arange(axis.size), loss)
        curves[name] = Curve(ranking, probe(axis, reader, own, loss) if probe else 1.0)
    return curves


def _energies(product: Product, statistics: Statistics, scale: torch.Tensor) -> np.ndarray:
    """Largest first. Parts of a matrix that is too large for the memory count as if they did not vary together."""
    if len(statistics.parts) == 1:
        return np.asarray(energies(product.matrix(), statistics.parts[0].covariance, scale)[0].cpu().numpy())
    wide = product.matrix()[0] * scale[0].abs()[:, None]
    made = sum(wide[:, part.columns] @ part.covariance[0] @ wide[:, part.columns].T for part in statistics.parts)
    values = torch.linalg.eigvalsh(torch.as_tensor(made)).clamp_min(0).flip(0)
    return np.asarray(values[: min(wide.shape)].cpu().numpy())


class _Probe:
    """Measures sensitivities: one layer of a lower rank at a time, in the order of the graph."""

    def __init__(self, channels: ChannelGraph, calibration: Calibration, settings: Compensation, distance: Distance) -> None:
        self._graph = channels.graph
        self._divergence = Divergences(channels.graph, calibration, settings.memory_mb, distance)

    def __call__(self, axis: RankAxis, reader: Reader, statistics: Statistics, loss: np.ndarray) -> float:
        """Divergence of the outputs per unit of loss."""
        if loss[0] <= 0:
            return 0.0
        hurting = np.flatnonzero(loss[: axis.largest + 1] >= PROBE * loss[0])
        rank = max(int(hurting.max()) if len(hurting) else axis.largest, 1)
        changed = quiet_deepcopy(self._graph)
        product = Product(changed.get_submodule(reader.layer))
        scale = affine(self._graph, reader.norm, product.outputs)[0].reshape(1, -1)
        covariance = statistics.parts[0].covariance if len(statistics.parts) == 1 else None
        one = Factorization(axis.layer, "svd", (rank,))
        matrix = reduced(product.matrix(), sizes_of(product.module), one, covariance, scale).matrix
        product.write(matrix, None)
        return sensitivity(self._divergence(changed, reader.node), float(loss[rank]), float(loss[0]))

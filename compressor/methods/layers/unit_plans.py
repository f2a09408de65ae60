"""From what becomes of each layer's units to a plan: producers are narrowed where all who read a channel do without it.

every reader of a channel drops it   the channel is removed, with what produces it
some readers drop it                 they read the others through a gather
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from compressor.methods.layers.cc_removal import State
from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.channels.layer_costs import Layer
from compressor.passes.channels.readers import Reader, readers_of
from compressor.passes.criteria import CRITERIA, Scoring
from compressor.passes.fitting.losses import rankable
from compressor.passes.labels.groups import ChannelGroup
from compressor.passes.layers.forms import FORMS
from compressor.passes.layers.product import Conv, Product
from compressor.values.plan import Factorization, Plan


class UnitPlans:
    """Makes plans for one network.

    Args:
        channels: Its analysis.
        align: Ranks and what stays of a group are multiples of this where they are larger.
    """

    def __init__(self, channels: ChannelGraph, align: int = 1) -> None:
        self._channels, self._align = channels, align
        self._scoring = Scoring(channels)
        self._readers = {reader.layer: reader for reader in readers_of(channels).values()}
        self._groups = {name: own for name, own in rankable(channels)[0].items() if self._plain(name)}

    @property
    def layers(self) -> dict[str, str | None]:
        """Convolutions -> None where CC may compress them, else the reason. The first one is left alone, as published."""
        found: dict[str, str | None] = {}
        for number, name in enumerate(self._readers):
            module = self._channels.graph.get_submodule(name)
            if not isinstance(module, Conv):
                found[name] = "it is a linear layer"
            elif Product(module).blocks > 1:
                found[name] = "it is a grouped convolution"
            else:
                found[name] = "it is the first layer" if number == 0 else None
        return found

    def removable(self, layer: str) -> NDArray[np.bool_]:
        """Mask over a layer's input channels: those that may go."""
        reader = self._readers[layer]
        product = Product(self._channels.graph.get_submodule(layer))
        if reader.inputs is None:
            return np.zeros(product.inputs, dtype=bool)
        owner = self._channels.grouping.group_of[reader.inputs]
        allowed = np.zeros(product.inputs, dtype=bool)
        for name in self._groups:
            allowed |= owner == self._index(name)
        return allowed

    def plan(self, states: Mapping[str, State]) -> Plan:
        """The plan in which every layer (by name) is in its state."""
        channels = self._channels
        kept: dict[str, list[int]] = {}
        masks, wanted = ([np.ones(group.size, dtype=bool) for group in channels.groups] for _ in range(2))
        for name, readers in self._groups.items():
            group = channels.groups[self._index(name)]
            needed = np.zeros(group.size, dtype=bool)
            for reader in readers:
                needed |= self._units(reader, name, states.get(reader.layer), group.size)
            wanted[self._index(name)] = needed
            masks[self._index(name)] = enough = self._enough(needed, group)
            if not enough.all():
                kept[name] = np.flatnonzero(enough).tolist()
        reads = self._reads(states, masks, wanted)
        widths = Plan.keep(kept, channels.digest, reads)
        return Plan.keep(kept, channels.digest, reads, self._factors(states, widths, masks))

    def _plain(self, name: str) -> bool:
        """Whether single units of a group may go, each of which is one input of its readers."""
        return self._channels.groups[self._index(name)].granularity == 1

    def _index(self, name: str) -> int:
        return next(k for k, group in enumerate(self._channels.groups) if group.name == name)

    def _units(self, reader: Reader, name: str, state: State | None, size: int) -> NDArray[np.bool_]:
        """Units of a group that a reader goes on reading."""
        assert reader.inputs is not None
        here = self._channels.grouping.group_of[reader.inputs] == self._index(name)
        read = np.ones(len(here), dtype=bool)
        if state is not None:
            read[:] = False
            read[list(state.kept)] = True
        units = np.zeros(size, dtype=bool)
        units[self._channels.grouping.unit_of[reader.inputs[here & read]]] = True
        return units

    def _enough(self, needed: NDArray[np.bool_], group: ChannelGroup) -> NDArray[np.bool_]:
        """At least as many as must stay, and a multiple of the alignment: those with the largest L1 norm come back."""
        count = max(int(needed.sum()), group.narrowest, 1)
        wanted = min(-(-count // self._align) * self._align if count > self._align else count, len(needed))
        result = needed.copy()
        if wanted > needed.sum():
            scores = CRITERIA["l1"]()(self._scoring, group)
            order = np.argsort(-scores, kind="stable")
            result[order[~needed[order]][: wanted - int(needed.sum())]] = True
        return result

    def _reads(
        self, states: Mapping[str, State], masks: list[NDArray[np.bool_]], wanted: list[NDArray[np.bool_]]
    ) -> dict[str, list[int]]:
        """Layers that read less than what others need; what came back for the alignment alone is read by all."""
        found = {}
        for layer, state in states.items():
            labels = self._readers[layer].inputs
            read = np.zeros(Product(self._channels.graph.get_submodule(layer)).inputs, dtype=bool)
            read[list(state.kept)] = True
            alive = np.ones_like(read)
            if labels is not None:
                alive = self._channels.kept_labels(labels, masks)
                read |= alive & ~self._channels.kept_labels(labels, wanted)
            if (alive & ~read).any() and (alive & read).any():
                found[layer] = np.flatnonzero(alive & read).tolist()
        return found

    def _factors(self, states: Mapping[str, State], plan: Plan, masks: list[NDArray[np.bool_]]) -> list[Factorization]:
        """Ranks, where a sequence is still smaller than the layer is after narrowing."""
        row = np.array([[int(mask.sum()) for mask in masks]], dtype=np.int64)
        reads = dict(plan.reads)
        svd, found = FORMS["svd"], []
        for layer, state in states.items():
            if state.rank is None:
                continue
            own = Layer.of(self._channels, layer)
            blocks, sizes = own.sizes(self._channels, row)
            sizes = replace(sizes, inputs=min(sizes.inputs, len(reads.get(layer, range(sizes.inputs)))))
            rank = -(-state.rank // self._align) * self._align if state.rank > self._align else state.rank
            rank = min(rank, svd.full(sizes)[0])
            if own.saves(blocks, sizes, svd.stages(sizes, (rank,))):
                found.append(Factorization(layer, "svd", (rank,)))
        return found

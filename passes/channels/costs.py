"""What a structure costs, without building it: exact MACs, parameters and weight memory.

Every axis length is affine in the widths, so a parameter's size is a product of affine forms and an
op's multiply-accumulates are a constant times such a product. Thousands of structures are answered by
one matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from compressor.passes.channels.branches import Branch
from compressor.passes.labels.groups import Grouping, live_counts
from compressor.passes.labels.labeler import IntArray, Labeler


@dataclass(frozen=True)
class Costs:
    """Costs of several structures, one entry each.

    Attributes:
        macs: Multiply-accumulates of convs, linears and matrix products for one sample.
        params: Elements of all parameters.
        memory_bytes: Bytes of all parameters and buffers.
    """

    macs: IntArray
    params: IntArray
    memory_bytes: IntArray


class CostModel:
    """Costs as a function of widths.

    Args:
        gm: The traced graph.
        labeler: The facts of its walk.
        grouping: Its groups.
        branches: Its branches. A structure may say of each whether it is there, 1 or 0, in columns behind those of the groups.
    """

    def __init__(self, gm: fx.GraphModule, labeler: Labeler, grouping: Grouping, branches: Sequence[Branch] = ()) -> None:
        self._grouping = grouping
        self._branches = len(branches)
        self._rows: list[NDArray[np.int64]] = []
        self._fixed: list[int] = []
        self._divisors: list[int] = []
        self._known: dict[tuple[int, int], int] = {}
        terms = [(term.constant, [self._form(labels, divisor) for labels, divisor in term.factors]) for term in labeler.terms]
        self.layers = tuple(term.layer for term in labeler.terms)
        self._nodes = tuple(term.node for term in labeler.terms)
        within = _tensors_within(gm, branches)
        sizes: dict[tuple[int, ...], list[int]] = {}  # tensors of one form together: their parameters, their bytes
        self._axes: dict[tuple[str, int], int] = {}
        parameters = dict(gm.named_parameters())
        self._shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        for name, tensor in {**parameters, **dict(gm.named_buffers())}.items():
            constant, forms = 1, []
            for axis, size in enumerate(tensor.shape):
                slot = labeler.slots.get((name, axis))
                if slot is None:
                    constant *= size
                else:
                    forms.append(self._form(slot.labels, slot.blocks))
                    self._axes[name, axis] = forms[-1]
            total = sizes.setdefault((*forms, *[-1 - k for k in within.get(id(tensor), ())]), [0, 0])
            total[0] += constant * (name in parameters)
            total[1] += constant * tensor.element_size()
        # a branch is one more factor, 1 or 0, of all that lies within it; its column is behind those of the forms
        self._sizes = [(self._columns(forms), params, memory) for forms, (params, memory) in sizes.items()]
        inside = [[k for k, branch in enumerate(branches) if term.node in branch.nodes] for term in labeler.terms]
        factors = [[*forms, *[-1 - k for k in own]] for (_, forms), own in zip(terms, inside, strict=True)]
        self._terms = [(constant, self._columns(own)) for (constant, _), own in zip(terms, factors, strict=True)]
        matrix = np.stack(self._rows) if self._rows else np.zeros((0, len(grouping.groups)), dtype=np.int64)
        # in float64, which a BLAS multiplies, and which is exact for counts like these
        self._matrix = np.ascontiguousarray(matrix.T, dtype=np.float64)
        self._granularity = np.array([group.granularity for group in grouping.groups], dtype=np.int64)

    def _form(self, labels: IntArray, divisor: int) -> int:
        key = (hash(labels.tobytes()), divisor)
        if key not in self._known:
            fixed, slopes = live_counts(labels, self._grouping)
            row = np.zeros(len(self._grouping.groups), dtype=np.int64)
            for group, slope in slopes.items():
                row[group] = slope
            self._known[key] = len(self._rows)
            self._rows.append(row)
            self._fixed.append(fixed)
            self._divisors.append(divisor)
        return self._known[key]

    def _columns(self, forms: Sequence[int]) -> list[int]:
        return [form if form >= 0 else len(self._rows) - 1 - form for form in forms]

    def __call__(self, widths: NDArray[np.int64] | Sequence[Sequence[int]]) -> Costs:
        """Costs of structures.

        Args:
            widths: (structures, groups): the width of every group, in the order of the groups; or (structures, groups and
                branches).
        """
        lengths = self._lengths(np.asarray(widths, dtype=np.int64))
        params = np.zeros(len(lengths), dtype=np.int64)
        memory = np.zeros(len(lengths), dtype=np.int64)
        for forms, own_params, own_memory in self._sizes:
            elements = np.prod(lengths[:, forms], axis=1, dtype=np.int64)
            params += own_params * elements
            memory += own_memory * elements
        return Costs(self.macs_by_term(lengths).sum(axis=1), params, memory)

    def macs(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The MACs of structures alone, (structures,): several times faster than all costs."""
        return np.asarray(self.by_term(widths).sum(axis=1))

    def by_term(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """MACs of structures, term by term, (structures, terms); `layers` says whose each term is."""
        return self.macs_by_term(self._lengths(np.asarray(widths, dtype=np.int64)))

    def by_layer(self, widths: Sequence[int]) -> dict[str, int]:
        """MACs per layer of one structure."""
        return self._by(self.layers, widths)

    def by_node(self, widths: Sequence[int]) -> dict[str, int]:
        """MACs per node of one structure."""
        return self._by(self._nodes, widths)

    def _by(self, names: Sequence[str], widths: Sequence[int]) -> dict[str, int]:
        terms = self.macs_by_term(self._lengths(np.asarray([widths], dtype=np.int64)))[0]
        result: dict[str, int] = {}
        for name, macs in zip(names, terms.tolist(), strict=True):
            result[name] = result.get(name, 0) + macs
        return result

    def axis_lengths(self, names: Sequence[tuple[str, int]], widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lengths of parameter axes.

        Args:
            names: `(parameter, axis)`; axes that no structure changes are not known here.
            widths: (structures, groups).

        Returns:
            (structures, names).

        Raises:
            KeyError: No structure changes this axis.
        """
        return self._lengths(np.asarray(widths, dtype=np.int64))[:, [self._axes[name] for name in names]]

    def axis_length(self, name: str, axis: int, widths: NDArray[np.int64]) -> int:
        """Length of one parameter's axis in one structure, (1, groups), whether it can change or not."""
        if (name, axis) in self._axes:
            return int(self.axis_lengths([(name, axis)], widths)[0, 0])
        return self._shapes[name][axis]

    def _lengths(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        groups = len(self._granularity)
        counts = (widths[:, :groups] // self._granularity).astype(np.float64) @ self._matrix
        lengths = (counts.astype(np.int64) + np.asarray(self._fixed, dtype=np.int64)) // np.asarray(self._divisors, dtype=np.int64)
        there = widths[:, groups:] if widths.shape[1] > groups else np.ones((len(widths), self._branches), dtype=np.int64)
        return np.concatenate([lengths, there], axis=1)

    def macs_by_term(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """(structures, terms) from axis lengths."""
        columns = [c * np.prod(lengths[:, forms], axis=1, dtype=np.int64) for c, forms in self._terms]
        return np.stack(columns, axis=1) if columns else np.zeros((len(lengths), 0), dtype=np.int64)


def _tensors_within(gm: fx.GraphModule, branches: Sequence[Branch]) -> dict[int, list[int]]:
    """`id` of a parameter or buffer -> the branches that alone use it, by their positions."""
    users: dict[int, set[str]] = {}
    for node in gm.graph.nodes if branches else ():
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            tensors = [*module.parameters(), *module.buffers()]
        elif node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            tensors = [getattr(gm.get_submodule(owner), leaf)]
        else:
            continue
        for tensor in tensors:
            users.setdefault(id(tensor), set()).add(node.name)
    return {key: [k for k, branch in enumerate(branches) if own <= set(branch.nodes)] for key, own in users.items()}

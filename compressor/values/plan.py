"""`Structure` and `Plan`: how many channels stay, and exactly which ones; which branches go, which layers become sequences.

A `Structure` is what costs and latencies depend on; a `Plan` is what a graph is rewritten by.
Both are frozen values that travel as JSON, never as pickles.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from compressor.errors import DataError, PlanError
from compressor.values.json_text import parse_json

SCHEMA = 2
"""Written; the first one, without branches, is read as well."""


def digest_of(value: object) -> str:
    """SHA-256 over the canonical JSON of `value`, as 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, order=True)
class Factorization:
    """One layer as a sequence of smaller ones.

    Attributes:
        layer: Its qualified name.
        form: Name of the form (`compressor.passes.layers.forms`).
        ranks: Inner sizes of each block, in the order of the sequence.
    """

    layer: str
    form: str
    ranks: tuple[int, ...]

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """The same as the ranks of a `Structure`."""
        return tuple((f"{self.layer}:{self.form}:{k}", rank) for k, rank in enumerate(self.ranks))

    @classmethod
    def of_axes(cls, axes: Iterable[tuple[str, int]]) -> "tuple[Factorization, ...]":
        """Back from the ranks of a `Structure`.

        Raises:
            PlanError: A name is not that of such an axis.
        """
        found: dict[tuple[str, str], dict[int, int]] = {}
        for name, rank in axes:
            layer, _, rest = name.partition(":")
            form, _, index = rest.partition(":")
            if not index.isdecimal():
                raise PlanError(f"structure: `{name}` is no rank; ranks are named `layer:form:number`")
            found.setdefault((layer, form), {})[int(index)] = rank
        return tuple(cls(layer, form, tuple(own[k] for k in sorted(own))) for (layer, form), own in found.items())


@dataclass(frozen=True)
class Structure:
    """Widths and ranks: everything a latency depends on.

    Attributes:
        widths: `(group name, number of channels that stay)`, in the order of the channel graph.
        ranks: `(layer:form:number, rank)` of factorized layers; see `Factorization.axes`.
        reads: `(layer name, number of inputs)` of layers that read a part of a stream through a gather.
        removed: Names of the branches that are not there; widths of what only they hold do not matter, and are the whole ones.
    """

    widths: tuple[tuple[str, int], ...]
    ranks: tuple[tuple[str, int], ...] = ()
    reads: tuple[tuple[str, int], ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A name for this structure that survives processes and machines."""
        more = [sorted(self.reads)] if self.reads or self.removed else []
        return digest_of([sorted(self.widths), sorted(self.ranks), *more, *([sorted(self.removed)] if self.removed else [])])

    def to_json(self) -> str:
        """The structure as a JSON text; `from_json` gives an equal value back."""
        data: dict[str, object] = {"schema": SCHEMA, "widths": dict(self.widths), "ranks": dict(self.ranks)}
        if self.reads:
            data["reads"] = dict(self.reads)
        if self.removed:
            data["removed"] = list(self.removed)
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> "Structure":
        """Read what `to_json` wrote.

        Raises:
            PlanError: The text is not such a JSON; the field is named.
        """
        data = _object(text, "structure")
        reads = _counts(data, "reads") if "reads" in data else ()
        return cls(_counts(data, "widths"), _counts(data, "ranks"), reads, _names(data, "removed", "structure"))


@dataclass(frozen=True)
class Plan:
    """Per channel group the indices that stay: the exact, serialised decision.

    Groups that are not named keep everything. Indices are positions within the group,
    ascending, counted on the *original* network.

    Attributes:
        kept: `(group name, kept indices)`, sorted by name.
        model: Digest of the architecture it was made for; empty when made by hand.
        reads: `(layer name, input channels that it goes on reading)`, counted on the original network, of layers that
            read a part of a stream through a gather, sorted by name.
        factors: Layers that become sequences after the removal, sorted by name.
        removed: Names of the branches that go as a whole (`compressor.passes.channels.branches`), sorted.
    """

    kept: tuple[tuple[str, tuple[int, ...]], ...]
    model: str = field(default="")
    reads: tuple[tuple[str, tuple[int, ...]], ...] = ()
    factors: tuple[Factorization, ...] = ()
    removed: tuple[str, ...] = ()

    @classmethod
    def keep(
        cls,
        kept: Mapping[str, Iterable[int]],
        model: str = "",
        reads: Mapping[str, Iterable[int]] | None = None,
        factors: Iterable[Factorization] = (),
        removed: Iterable[str] = (),
    ) -> "Plan":
        """Make a plan by hand.

        Args:
            kept: For every group to be narrowed, the indices of its channels that stay.
            model: Digest of the architecture (`ChannelGraph.digest`); without it any graph that has
                these groups is accepted.
            reads: For layers that are to read a part of a stream, which of their input channels.
            factors: Layers that are to become sequences.
            removed: Names of branches that are to go.

        Raises:
            PlanError: An index is not a non-negative integer, is given twice, or a group would be empty; a rank is not
                positive, or a layer is factorized twice.
        """
        chosen = reads or {}
        factored = tuple(sorted(factors))
        for before, after in itertools.pairwise(factored):
            if before.layer == after.layer:
                raise PlanError(f"plan: layer `{after.layer}` is factorized twice")
        for one in factored:
            if not one.ranks or any(not isinstance(r, int) or isinstance(r, bool) or r < 1 for r in one.ranks):
                raise PlanError(f"plan: ranks of `{one.layer}` must be positive integers, found {list(one.ranks)}")
        return cls(
            tuple(sorted((name, _indices(f"group `{name}` keeps", list(kept[name]))) for name in kept)),
            model,
            tuple(sorted((name, _indices(f"layer `{name}` reads", list(chosen[name]))) for name in chosen)),
            factored,
            tuple(sorted(set(removed))),
        )

    @property
    def digest(self) -> str:
        """A name for this plan that survives processes and machines."""
        data: list[object] = [self.kept, self.model, self.reads, [f.axes for f in self.factors], self.removed]
        while len(data) > 2 and not data[-1]:  # what is not there does not count: digests stay as older versions made them
            data.pop()
        return digest_of(data)

    def to_json(self) -> str:
        """The plan as a JSON text; `from_json` gives an equal value back."""
        data: dict[str, object] = {"schema": SCHEMA, "model": self.model, "keep": dict(self.kept)}
        if self.reads:
            data["reads"] = dict(self.reads)
        if self.factors:
            data["factors"] = {one.layer: {"form": one.form, "ranks": list(one.ranks)} for one in self.factors}
        if self.removed:
            data["removed"] = list(self.removed)
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            PlanError: The text is truncated, of another schema, or holds anything but a plan; the field is named.
        """
        data = _object(text, "plan")
        model = data.get("model")
        if not isinstance(model, str):
            raise PlanError(f"plan: field `model` must be a text, found {model!r}")
        reads = _lists(data, "reads") if "reads" in data else None
        return cls.keep(_lists(data, "keep"), model, reads, _factors(data), _names(data, "removed", "plan"))

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan file.

        Raises:
            PlanError: The file cannot be read or holds no plan.
        """
        try:
            if not Path(path).is_file():
                raise PlanError(f"plan {path}: cannot be read (no such file, or no plain one)")
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:
            raise PlanError(f"plan {path}: cannot be read ({error})") from error
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _factors(data: dict[str, object]) -> list[Factorization]:
    found = data.get("factors", {})
    if not isinstance(found, dict):
        raise PlanError(f"plan: field `factors` must be an object, found {type(found).__name__}")
    factors = []
    for layer, own in found.items():
        form, ranks = (own.get("form"), own.get("ranks")) if isinstance(own, dict) else (None, None)
        if not isinstance(form, str) or not isinstance(ranks, list):
            raise PlanError(f"plan: field `factors[{layer!r}]` must hold a form and a list of ranks, found {own!r}")
        factors.append(Factorization(layer, form, tuple(ranks)))
    return factors


def _lists(data: dict[str, object], key: str) -> dict[str, list[int]]:
    found = data.get(key)
    if not isinstance(found, dict):
        raise PlanError(f"plan: field `{key}` must be an object of index lists, found {type(found).__name__}")
    for name, indices in found.items():
        if not isinstance(indices, list):
            raise PlanError(f"plan: field `{key}[{name!r}]` must be a list of indices, found {indices!r}")
    return found


def _names(data: dict[str, object], key: str, what: str) -> tuple[str, ...]:
    found = data.get(key, [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise PlanError(f"{what}: field `{key}` must be a list of names, found {found!r}")
    return tuple(found)


def _indices(what: str, indices: list[object]) -> tuple[int, ...]:
    for index in indices:
        plain = index.item() if hasattr(index, "item") else index  # numpy and torch integers
        if not isinstance(plain, int) or isinstance(plain, bool) or plain < 0:
            raise PlanError(f"plan: {what} {index!r}; indices are non-negative integers")
    numbers = sorted(int(cast(int, index)) for index in indices)
    if not numbers:
        raise PlanError(f"plan: {what} nothing; at least one channel must stay")
    for before, after in itertools.pairwise(numbers):
        if before == after:
            raise PlanError(f"plan: {what} index {after} twice")
    return tuple(numbers)


def _object(text: str, what: str) -> dict[str, object]:
    try:
        data = parse_json(text)
    except DataError as error:
        raise PlanError(f"{what}: {error}; write it anew with `to_json`") from error
    schema = data.get("schema")
    if isinstance(schema, bool) or schema not in range(1, SCHEMA + 1):
        raise PlanError(f"{what}: field `schema` is {schema!r}, this version reads 1 to {SCHEMA}")
    return data


def _counts(data: dict[str, object], key: str) -> tuple[tuple[str, int], ...]:
    value = data.get(key)
    if not isinstance(value, dict):
        raise PlanError(f"structure: field `{key}` must be an object of counts, found {type(value).__name__}")
    for name, count in value.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise PlanError(f"structure: field `{key}[{name!r}]` must be a positive integer, found {count!r}")
    return tuple(value.items())

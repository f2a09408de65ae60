"""`Target`: what the network is to be fast on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from compressor.errors import BackendError

Option = str | int | float | bool
_YES, _NO = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})


class Described(Protocol):
    """What a target has to know of a back end."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those it can build."""

    @property
    def options(self) -> Mapping[str, Option]:
        """Its settings and their defaults."""

    def fingerprint(self, target: "Target") -> dict[str, object]:
        """See `Backend`."""


_MOST = {"batch": 1 << 20, "threads": 1024, "align": 1 << 16}
_known: dict[str, Callable[[], Described]] = {}  # filled by `runtime.backends`, whose table stands above this file


def make_known(backends: Mapping[str, Callable[[], Described]]) -> None:
    """Let targets name these back ends."""
    _known.update(backends)


@dataclass(frozen=True)
class Target:
    """A back end and how it is used; a latency holds for one target only.

    Attributes:
        backend: Name of a back end (`compressor.runtime.backends.BACKENDS`).
        batch: Batch size that is timed.
        threads: CPU threads within an op.
        align: Widths are multiples of this many channels where a group allows it (vector width).
        precision: `fp32`; `fp16` and `bf16` (inputs and outputs stay fp32); `int8` (static quantization).
        options: Settings of the back end, such as `{"mode": "compile"}` for `torch` or `{"optimization_level": 5}`
            for `tensorrt`; each back end lists its own.

    Raises:
        BackendError: There is no such back end, precision or option, or a number is not positive.
    """

    backend: str = "onnxruntime"
    batch: int = 1
    threads: int = 1
    align: int = 8
    precision: str = "fp32"
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.backend not in _known:
            raise BackendError(f"there is no back end `{self.backend}`; there are {', '.join(sorted(_known))}")
        for name in ("batch", "threads", "align"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST[name]:
                raise BackendError(f"target {name} must be a positive integer up to {_MOST[name]:,}, found {value!r}")
        backend = _known[self.backend]()
        if self.precision not in backend.precisions:
            raise BackendError(
                f"the back end `{self.backend}` has no precision {self.precision!r}; it has {', '.join(backend.precisions)}"
            )
        for name, value in self.options.items():
            if name not in backend.options:
                known = ", ".join(backend.options) or "none"
                raise BackendError(f"the back end `{self.backend}` has no option `{name}`; it has {known}")
            default = backend.options[name]
            if type(value) is not type(default):
                raise BackendError(
                    f"option `{name}` of `{self.backend}` is a {type(default).__name__}, such as {default!r}; found {value!r}"
                )
        object.__setattr__(self, "options", MappingProxyType({**backend.options, **self.options}))

    def fingerprint(self) -> dict[str, object]:
        """Everything that a latency depends on besides the network: device, versions, settings.

        Raises:
            BackendError: The back end's package is missing.
        """
        own = {"backend": self.backend, "batch": self.batch, "threads": self.threads, "precision": self.precision}
        return {**own, "options": dict(self.options), **_known[self.backend]().fingerprint(self)}

    def to_dict(self) -> dict[str, object]:
        """The fields as plain data."""
        return {
            "backend": self.backend, "batch": self.batch, "threads": self.threads, "align": self.align,
            "precision": self.precision, "options": dict(self.options),
        }  # fmt: skip


def option_of(text: str, known: Mapping[str, Option]) -> tuple[str, Option]:
    """Read `name=value` as the kind of value that an option's default has.

    Args:
        text: What a user wrote.
        known: Options of a back end and their defaults; the value of an unknown one stays a text, for `Target` to refuse.

    Raises:
        BackendError: There is no `=`, or the value is not of that kind.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise BackendError(f"{text!r}: write name=value")
    default = known.get(name, "")
    if isinstance(default, bool):
        if value.lower() not in _YES | _NO:
            raise BackendError(f"{text!r}: {name} is yes or no")
        return name, value.lower() in _YES
    try:
        return name, type(default)(value)
    except ValueError as error:
        raise BackendError(f"{text!r}: {name} is a number") from error

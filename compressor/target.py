"""`Target`: what the network is to be fast on."""

from dataclasses import asdict, dataclass

from compressor.errors import BackendError


@dataclass(frozen=True)
class Target:
    """A back end and how it is used; a latency holds for one target only.

    Attributes:
        backend: Name of a back end (`compressor.runtime.BACKENDS`).
        batch: Batch size that is timed.
        threads: CPU threads within an op.
        align: Widths are multiples of this many channels where a group allows it (vector width).

    Raises:
        BackendError: There is no such back end, or a number is not positive.
    """

    backend: str = "onnxruntime"
    batch: int = 1
    threads: int = 1
    align: int = 8

    def __post_init__(self) -> None:
        """Check the fields."""
        from compressor.runtime import BACKENDS  # the table imports this file

        if self.backend not in BACKENDS:
            raise BackendError(f"there is no back end `{self.backend}`; there are {', '.join(sorted(BACKENDS))}")
        for name in ("batch", "threads", "align"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BackendError(f"target {name} must be a positive integer, found {value!r}")

    def fingerprint(self) -> dict[str, object]:
        """Everything that a latency depends on besides the network: device, versions, settings.

        Raises:
            BackendError: The back end's package is missing.
        """
        from compressor.runtime import BACKENDS  # the table imports this file

        return BACKENDS[self.backend]().fingerprint(self)

    def to_dict(self) -> dict[str, object]:
        """The fields as plain data."""
        return asdict(self)

"""Candidates judged on a Ray cluster, and latencies measured on the nodes that hold the target device.

Model and data go into the object store once. A candidate is a task: any node may judge it, several at once; when a node is
lost, its tasks begin again elsewhere. A task that measures has the target device for itself, through the custom resource
`compressor_target`, which the nodes that have the device are started with:

    ray start --address=HEAD --resources='{"compressor_target": 1}'

and all CPUs of that node: on most targets they are what is measured, on the others they launch its work. It measures what
the search asks for: the engines of the latency model, leaders, and the candidates of the last bisection. Staircases, an absolute
budget's original, single layers beside their sequences (of `CC`, `CaP` with ranks and `Factorize`) and the latency that is reported
in the end are measured by the process that called.
"""

import contextlib
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compressor.errors import BackendError, DataError
from compressor.passes.channels.analyze import ChannelGraph, analyze
from compressor.passes.statistics.calibration import Calibration
from compressor.passes.tracing.portable import Portable, assembled, portable
from compressor.passes.tracing.trace import on_cpu
from compressor.passes.transforms.apply_plan import applied
from compressor.runtime.latency_model.model import Observation
from compressor.runtime.latency_model.training_engines import observe
from compressor.runtime.measuring.measure import Comparison
from compressor.search.fitness import Fitness, Judge, Worth
from compressor.tasks.samples import Sample
from compressor.values.plan import Plan, Structure
from compressor.values.target import Target
from compressor.values.trial import Trial

try:
    import ray
except ImportError as error:
    raise BackendError("a cluster needs the package `ray`: pip install 'fx-compressor[cluster]'") from error

DEVICE = "compressor_target"
"""Custom resource of the nodes that hold the target device."""

_RETRIES = 5
_judges: dict[str, Judge] = {}  # of this worker process, by parcel
_devices: dict[str, "_Device"] = {}


@dataclass(frozen=True)
class Parcel:
    """What judging takes, once in the object store.

    Attributes:
        graph: The network.
        fitness: How.
        holdout: What candidates are judged on.
        calibration: Images, or None.
        train: Batches, as many as the fitness trains on.
        seed: Of the search.
        threads: Of a task.
    """

    graph: Portable
    fitness: Fitness
    holdout: tuple[Sample, ...]
    calibration: Calibration | None
    train: tuple[Sample, ...]
    seed: int
    threads: int


def connect(address: str) -> None:
    """Join a cluster, once per process.

    Raises:
        BackendError: There is none at this address.
    """
    if ray.is_initialized():
        return
    place, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((place, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise BackendError(f"there is no Ray cluster at {address}: {line}; start one with `ray start --head`") from error


@ray.remote(max_retries=_RETRIES)
def _judge(parcel: list[Any], plan: str) -> Worth:
    key = parcel[0].hex()
    if key not in _judges:
        own: Parcel = ray.get(parcel[0])
        torch.set_num_threads(own.threads)
        _judges.clear()  # of an earlier search
        _judges[key] = Judge(analyze(assembled(own.graph)), own.fitness, own.holdout, own.calibration, own.train, own.seed)
    return _judges[key](Plan.from_json(plan))


class Cluster:
    """An executor; see the module.

    Args:
        address: Of the cluster.
        graph: The network.
        fitness: How candidates are judged.
        holdout: What they are judged on.
        calibration: Images that they are repaired on, or None.
        train: Batches that they are trained on.
        seed: Of the search.
        threads: CPUs of one task.

    Raises:
        BackendError: There is no cluster.
        DataError: The network or its data cannot be sent.
    """

    def __init__(
        self, address: str, graph: fx.GraphModule, fitness: Fitness, holdout: Sequence[Sample], calibration: Calibration | None,
        train: Sequence[Sample], seed: int, threads: int = 1,
    ) -> None:  # fmt: skip
        connect(address)
        calibration = calibration.first(fitness.images) if calibration is not None else None
        own = portable(on_cpu(graph))  # workers may have no GPU
        parcel = Parcel(own, fitness, tuple(holdout), calibration, tuple(train), seed, threads)
        self._parcel, self._threads = _put(parcel), threads
        self._waiting: dict[int, Any] = {}

    def submit(self, number: int, task: Plan) -> None:
        """See `Executor`."""
        self._waiting[number] = _judge.options(num_cpus=self._threads).remote([self._parcel], task.to_json())

    def outcome(self, number: int) -> Worth:
        """See `Executor`."""
        found: Worth = _fetched(self._waiting.pop(number))
        return found

    def close(self) -> None:
        """Let candidates go that nobody waits for; the connection stays."""
        for reference in self._waiting.values():
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)
        self._waiting.clear()


class _Device:
    """What measuring takes, in a worker of the node that holds the device."""

    def __init__(self, graph: Portable, target: Target, seed: int) -> None:
        self._channels: ChannelGraph = analyze(assembled(graph))
        self._target, self._seed = target, seed

    def fingerprint(self) -> dict[str, object]:
        return self._target.fingerprint()

    def trial(self, plan: str) -> Trial:
        own = Plan.from_json(plan)
        with Comparison(self._channels.graph, self._target, self._seed) as comparison:
            found, original = comparison.measure(applied(own, self._channels))
        return Trial(self._channels.structure(own), found, original)

    def observe(self, structures: Sequence[Structure], anchor_ms: float | None) -> list[Observation]:
        return list(observe(self._channels, structures, self._target, anchor_ms=anchor_ms))


@ray.remote(max_retries=_RETRIES)
def _measure(parcel: list[Any], what: str, *arguments: Any) -> Any:
    key = parcel[0].hex()
    if key not in _devices:
        _devices.clear()
        _devices[key] = _Device(*ray.get(parcel[0]))
    return getattr(_devices[key], what)(*arguments)


class RemoteDevice:
    """The target device of a cluster.

    Args:
        address: Of the cluster.
        channels: The analysis of the network.
        target: Where its networks are measured.
        seed: Of inputs and order.

    Raises:
        BackendError: There is no cluster, or no node of it has the resource.
    """

    def __init__(self, address: str, channels: ChannelGraph, target: Target, seed: int) -> None:
        if not has_device(address):
            raise BackendError(
                f"no node of the cluster holds the target device; start the one that does with --resources='{{\"{DEVICE}\": 1}}'"
            )
        own = Target(**target.to_dict())  # type: ignore[arg-type]
        self._parcel = _put((portable(channels.graph), own, seed))

    def fingerprint(self) -> dict[str, object]:
        """Of the target, as the node has it."""
        found: dict[str, object] = self._call("fingerprint")
        return found

    def trial(self, plan: Plan) -> Trial:
        """Build and time the network of a plan beside the original."""
        found: Trial = self._call("trial", plan.to_json())
        return found

    def observe(self, structures: Sequence[Structure], anchor_ms: float | None = None) -> list[Observation]:
        """Build and measure structures for a latency model."""
        found: list[Observation] = self._call("observe", list(structures), anchor_ms)
        return found

    def _call(self, what: str, *arguments: Any) -> Any:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        cpus = min((own.get("CPU", 0) for own in nodes if own.get(DEVICE)), default=0)  # whichever takes it has as many
        return _fetched(_measure.options(resources={DEVICE: 1}, num_cpus=cpus).remote([self._parcel], what, *arguments))


def has_device(address: str) -> bool:
    """Whether a node of the cluster holds the target device."""
    connect(address)
    return bool(ray.cluster_resources().get(DEVICE))  # type: ignore[no-untyped-call]


def _put(value: object) -> Any:
    """Into the object store.

    Raises:
        DataError: It cannot be sent.
    """
    try:
        return ray.put(value)
    except (TypeError, AttributeError, ValueError) as error:
        raise DataError(f"the network or its data cannot be sent to the cluster: {str(error).strip().splitlines()[0]}") from error


def _fetched(reference: Any) -> Any:
    """What a task returned; what it raised is raised as it was, what befell the cluster as `BackendError`."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else BackendError(str(error)) from error
    except ray.exceptions.RayError as error:
        raise BackendError(f"the cluster lost it: {str(error).strip().splitlines()[0]}") from error

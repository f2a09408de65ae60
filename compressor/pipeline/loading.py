"""Networks of finished runs. Every file is compared with the digest that the run has of it, and none can hold code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from compressor.errors import BackendError, DataError, PlanError
from compressor.passes.channels.analyze import analyze
from compressor.passes.layers.product import take_state
from compressor.passes.tracing.network_reading import network_from
from compressor.passes.tracing.trace import example_inputs_of, outputs_of, trace
from compressor.passes.transforms.apply_plan import applied
from compressor.passes.transforms.verify import relative_error
from compressor.runs.folder import read_checked, run_of
from compressor.runtime.backends.onnxruntime import OnnxRuntimeEngine
from compressor.runtime.onnx.precision import PARITY
from compressor.runtime.onnx.read import onnx_from
from compressor.values.files import check_finite, have_to_be_finite, read_json, tensors_from
from compressor.values.plan import Plan
from compressor.values.target import Target


def network_of_run(folder: Path) -> fx.GraphModule:
    """The compressed network of a run, from its network file.

    Raises:
        DataError: The run is not finished, or the file was changed, is damaged, or of an older version.
    """
    file = folder / "network.safetensors"
    if not file.exists():
        if (folder / "program.pt2").exists():
            raise DataError(
                f"{folder} is of a version that wrote program.pt2, which is a pickle and could run code: load it with the model "
                "(compressor.load(run, model)), or give the command that made it again"
            )
        if (folder / "model.onnx").exists():
            raise DataError(
                f"{folder} holds no {file.name}: the network has a part that no such file holds, or it was removed; load it "
                "with the model (compressor.load(run, model)), or give the command that made it again"
            )
        raise DataError(f"{folder} holds no {file.name}; is it a run, and is it finished?")
    data = read_checked(file)
    try:
        graph = network_from(data)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    check_finite(have_to_be_finite(graph), file)
    return graph


def onnx_of_run(folder: Path) -> bytes:
    """The ONNX file of a run.

    Raises:
        DataError: The run is not finished, or the file was changed or is damaged.
    """
    file = folder / "model.onnx"
    if not file.exists():
        raise DataError(f"{folder} holds no {file.name}; is it a run, and is it finished?")
    data = read_checked(file)
    onnx_from(data, file, alone=True)
    return data


def rebuilt(folder: Path, model: nn.Module) -> fx.GraphModule:
    """The compressed network of a run, from the original architecture, the plan and the weights.

    Raises:
        DataError: There is no finished run, or a file was changed since it was written.
        PlanError: The plan does not fit the model.
    """
    base = run_of(folder)
    if base is None:
        raise DataError(f"{folder} is no run: there is no run.json in it or above it")
    plan, weights = folder / "plan.json", folder / "weights.safetensors"
    try:
        text = read_checked(plan).decode()
    except UnicodeDecodeError as error:
        raise PlanError(f"{plan}: no text ({error})") from error
    graph = applied(Plan.from_json(text), analyze(trace(model, _inputs(base))), weights=False)
    tensors = tensors_from(read_checked(weights), weights)
    check_finite(tensors, weights, graph.state_dict())
    take_state(graph, tensors)
    return graph.eval()


def check_run(folder: Path) -> float:
    """Compare the ONNX file of a run with its network; returns the relative error.

    Raises:
        DataError: The run is not finished, or a file was changed.
        BackendError: They differ by more than `PARITY`.
    """
    network, model = network_of_run(folder), onnx_of_run(folder)
    example = example_inputs_of(network)
    expected = run_network(network, example)
    with OnnxRuntimeEngine(model, example, Target()) as engine:
        found = [torch.from_numpy(np.asarray(x)) for x in engine.run([x.numpy() for x in example])]
    error = relative_error(found, expected)
    if not error <= PARITY["fp32"]:
        raise BackendError(
            f"the ONNX file of {folder} differs from its network by a relative {error:.2e} (allowed {PARITY['fp32']:.0e})"
        )
    return error


def run_network(network: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of a network that came from a file.

    Raises:
        DataError: It does not run: its parts do not fit each other.
    """
    try:
        with torch.no_grad():
            return outputs_of(network(*inputs))
    except Exception as error:
        raise DataError(
            f"the network of this file does not run: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _inputs(base: Path) -> list[Tensor]:
    """Example inputs of the original."""
    file = base / "run.json"
    config = read_json(file).get("config")
    try:
        shapes = cast(list[Any], cast(dict[str, object], config)["inputs"])
        found = [torch.empty(tuple(int(n) for n in shape), dtype=getattr(torch, dtype), device="meta") for shape, dtype in shapes]
        if sum(x.numel() for x in found) > 1 << 28:
            raise DataError(f"{file}: the inputs of this run are larger than any network takes")
        return [torch.zeros_like(x, device="cpu") for x in found]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{file} holds no inputs that can be read ({error})") from error

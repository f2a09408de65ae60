"""Example inputs from `--input`."""

from typing import Any

import typer


def inputs_of(shapes: list[str]) -> tuple[Any, ...]:
    """Zeros of the given shapes; only the shapes matter."""
    import torch

    inputs = []
    for text in shapes:
        parts = text.lower().replace(",", "x").split("x")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise typer.BadParameter(f"{text!r}: write sizes joined by x, such as 1x3x224x224", param_hint="--input")
        inputs.append(torch.zeros([int(part) for part in parts]))
    return tuple(inputs)

"""What `--task` and `--metric` name: a ready task with its settings, or something of the user's."""

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from compressor.tasks import Task


def task_of(text: str | None, metric: str | None) -> "Task | None":
    """The task of `--task` with the metric of `--metric`; None where nothing is said.

    Args:
        text: `segmentation:classes=21`, or `module:callable` that returns a task.
        metric: `module:callable`: called with `(model, batches)`, or returning a metric where it takes no arguments.

    Raises:
        BadParameter: There is no such task, or its settings are others.
        DataError: The callable fails, or returns something else.
    """
    from compressor.data.user_models import load_callable
    from compressor.tasks import Metric, classification

    task = _task(text) if text is not None else None
    if metric is None:
        return task
    found: Any = load_callable(metric)
    return replace(task or classification(), metric=Metric.of(found if inspect.signature(found).parameters else found()))


def _task(text: str) -> "Task":
    from compressor.data.user_models import called
    from compressor.errors import DataError
    from compressor.tasks import TASKS, Task

    name, _, rest = text.partition(":")
    if name not in TASKS:
        if not rest:
            known = ", ".join(TASKS)
            raise typer.BadParameter(f"{text!r}: ready tasks are {known}; others are module:callable", param_hint="--task")
        found = called(text)
        if not isinstance(found, Task):
            raise DataError(f"{text}() must return a compressor.Task, it returned {type(found).__name__}")
        return found
    taken = inspect.signature(TASKS[name]).parameters
    settings = dict(_setting(part, name, list(taken)) for part in rest.split(",") if part)
    missing = [own for own, parameter in taken.items() if parameter.default is parameter.empty and own not in settings]
    if missing:
        raise typer.BadParameter(f"{name} needs its number of {missing[0]}: write {name}:{missing[0]}=21", param_hint="--task")
    return TASKS[name](**settings)


def _setting(text: str, task: str, known: list[str]) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or name not in known:
        said = f"its settings are {', '.join(known)}" if known else "it has no settings"
        raise typer.BadParameter(f"{task} has no {name!r}: {said}", param_hint="--task")
    try:
        return name, int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError as error:
        raise typer.BadParameter(f"{task}: {name} must be a number, found {value!r}", param_hint="--task") from error

"""The user's own functions: a model factory, calibration batches and a task metric, named ``module:function``.

Naming one is the explicit opt-in to run its code; nothing here is reached otherwise.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.in_memory import Arguments, in_memory
from alphasmith.objectives.text import error_line

#: What a user's function raises on its own bad input. Anything else is a defect there, and keeps its traceback.
_USER_ERRORS = (ImportError, AttributeError, TypeError, ValueError, LookupError, OSError, RuntimeError)


def call_factory(spec: str, *, path: Path | None = None, factory_path: Path | None = None) -> tuple[nn.Module, Any]:
    """Build a model with the user's function.

    Args:
        spec: ``module:function``. The function is called with ``str(path)`` if ``path`` is given, else with nothing, and
            returns the model, or (model, configuration).
        path: What the function loads, for example a folder.
        factory_path: Folder the module is imported from; on ``sys.path`` only during the call.

    Returns:
        The model and its configuration, or None for the latter.

    Raises:
        InputError: The function cannot be imported, fails, or returns no model.
    """
    made = call_function("model.factory", spec, path=path, factory_path=factory_path)
    model, config = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            "model.factory",
            f"{spec} returned {type(model).__name__}",
            "return an nn.Module or (nn.Module, configuration)",
        )
    return model, config


def call_function(field: str, spec: str, *, path: Path | None = None, factory_path: Path | None = None) -> Any:
    """What the user's function returns.

    Args:
        field: Of the configuration, for errors.
        spec: ``module:function``, called as in ``call_factory``.
        path: Passed on as text, if given.
        factory_path: Folder the module is imported from; on ``sys.path`` only during the call.

    Raises:
        InputError: The function cannot be imported, or fails.
    """
    with _searching(factory_path, field):
        return _run(field, _resolve(field, spec, factory_path), spec, _arguments(path))


def load_batches(
    spec: str,
    *,
    path: Path | None = None,
    factory_path: Path | None = None,
    limit: int | None = None,
    arguments: Arguments | None = None,
) -> list[Batch]:
    """Calibration batches from the user's function.

    Args:
        spec: ``module:function``, called as in ``call_factory``; returns an iterable of what ``in_memory`` takes, for
            example a list of argument tuples.
        path: Passed on as text, if given.
        factory_path: Folder the module is imported from.
        limit: Samples taken at most [samples].
        arguments: As of ``in_memory``.

    Raises:
        InputError: The function fails or its batches cannot be used.
    """
    with _searching(factory_path), torch.no_grad():
        made = _run("data.factory", _resolve("data.factory", spec, factory_path), spec, _arguments(path))
        if isinstance(made, (str, bytes)) or not hasattr(made, "__iter__"):
            raise InputError("data.factory", f"{spec} returned {type(made).__name__}", "return a list of batches")
        return in_memory(
            made, limit=limit, arguments=arguments
        )  # a generator of the user's runs here, inside the search path


def load_metric(
    spec: str, *, path: Path | None = None, factory_path: Path | None = None
) -> Callable[[nn.Module], dict[str, float]]:
    """A task metric from the user's function.

    Args:
        spec: ``module:function``; called as ``function(str(path), model)`` if ``path`` is given, else ``function(model)``;
            returns a number, or a mapping of names to numbers.
        path: Passed on as text, if given.
        factory_path: Folder the module is imported from.

    Returns:
        A function of the model that gives the numbers by name; a lone number is called ``metric``. It raises
        ``InputError`` when the user's function fails or returns something else, and ``NonFiniteError`` for NaN or
        infinity.

    Raises:
        InputError: The function cannot be imported.
    """
    with _searching(factory_path):
        function = _resolve("data.metric", spec, factory_path)

    def metric(model: nn.Module) -> dict[str, float]:
        with _searching(factory_path), torch.no_grad():
            made = _run("data.metric", function, spec, (*_arguments(path), model))
        values = made if isinstance(made, Mapping) else {"metric": made}
        numbers: dict[str, float] = {}
        for name, value in values.items():
            try:
                numbers[str(name)] = float(value)
            except (TypeError, ValueError) as error:
                raise InputError(
                    "data.metric", f"{spec} returned {type(value).__name__} as {name!r}", "return numbers"
                ) from error
            if not math.isfinite(numbers[str(name)]):
                raise NonFiniteError(f"metric {name!r} of {spec} is {value}")
        if not numbers:
            raise InputError("data.metric", f"{spec} returned nothing", "return a number or a mapping of numbers")
        return numbers

    return metric


def _arguments(path: Path | None) -> tuple[str, ...]:
    return () if path is None else (str(path),)


def _run(field: str, function: Callable[..., Any], spec: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except (InputError, NonFiniteError):
        raise
    except _USER_ERRORS as error:
        raise InputError(field, f"{spec} failed ({error_line(error)})", "repair the function") from error


def _resolve(field: str, spec: str, factory_path: Path | None) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise InputError(field, f"{spec!r} is not module:function", "write it like zoo:load_model")
    try:
        module = importlib.import_module(module_name)
    except (*_USER_ERRORS, SyntaxError) as error:
        raise InputError(
            field, f"module {module_name!r} cannot be imported ({error})", f"install it or set {_folder_field(field)}"
        ) from error
    origin = getattr(module, "__file__", None)
    if factory_path is not None and (
        origin is None or not Path(origin).resolve().is_relative_to(factory_path.resolve())
    ):
        # An installed or already imported module of the same name would run instead, unnoticed.
        raise InputError(field, f"module {module_name!r} comes from {origin}, not from {factory_path}", "rename it")
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(field, f"module {module_name!r} has no function {name!r}", "name an existing function")
    return function  # type: ignore[no-any-return]


def _folder_field(field: str) -> str:
    """Where the folder of a function's module is given; one folder serves all functions of a run."""
    return "task.factory_path" if field.startswith("task.") else "model.factory_path"


@contextmanager
def _searching(folder: Path | None, field: str = "model.factory") -> Iterator[None]:
    """``folder`` first on ``sys.path``, for as long as the block runs."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        remedy = "give the folder that holds the module"
        raise InputError(_folder_field(field), f"{folder} is not a folder", remedy)
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)

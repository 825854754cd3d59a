"""A quantized model as plain tensors and a JSON-able description, and back, bit for bit. Files are written elsewhere.

Tensors are named as in the float model (``model.layers.0.mlp.up_proj.bias``); a quantized operator adds
``weight_values``, ``weight_scale``, ``input_scale`` (static activations), ``smooth`` (explicit sites), ``shift`` and
``correction`` (shifted sites) in place of ``weight``. Buffers are kept whether the model saves them or not, because folding
may have written into any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.modules import operator_module, replace_module
from alphasmith.objectives.quantization.operator import TENSORS, OperatorPayload, QuantizedOperator
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.stack import TENSORS as STACK_TENSORS
from alphasmith.objectives.quantization.stack import QuantizedStack, put

FORMAT = 1


def payload(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything needed to rebuild a quantized model on top of a float skeleton.

    Args:
        model: A model with :class:`QuantizedOperator` modules.

    Returns:
        Tensors on the CPU, contiguous, no two sharing storage (as safetensors demands) and otherwise sharing memory with
        the model; and a structure of JSON types: ``format``, ``operators`` (name, kind, transposed, scheme, execution, dtype),
        ``stacks`` (name, shape, transposed, scheme, dtype) of several matrices in one tensor, and ``aliases`` (name -> the name its tensor is stored under, for tied tensors).

    Raises:
        InputError: Two tensors of the model would get one name.
    """
    operators = {name: module for name, module in _modules(model) if isinstance(module, QuantizedOperator)}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, tensor in _named_tensors(model, operators):
        if name in tensors or name in aliases:
            raise InputError(name, "two tensors of the model have this name", "rename the buffer of the inner operator")
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        # The same memory, seen the same way, is one tensor; other overlaps are copied apart.
        key = (*storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in stored:
            aliases[name] = stored[key]
            continue
        stored[key] = name
        apart = tensor.numel() > 0 and storage in storages
        storages.add(storage)
        plain = tensor.detach().to("cpu").contiguous()
        tensors[name] = plain.clone() if apart and plain.data_ptr() == tensor.data_ptr() else plain
    structure: dict[str, Any] = {
        "format": FORMAT,
        "operators": [
            {
                "name": name,
                "kind": operator.kind,
                "transposed": operator.transposed,
                "scheme": operator.scheme.name,
                "execution": operator.execution,
                "dtype": str(operator.dtype).removeprefix("torch."),
            }
            for name, operator in operators.items()
        ],
        "stacks": [
            {
                "name": name,
                "shape": list(stack.shape),
                "transposed": stack.transposed,
                "scheme": stack.scheme.name,
                "dtype": str(stack.dtype).removeprefix("torch."),
            }
            for name, stack in _modules(model)
            if isinstance(stack, QuantizedStack)
        ],
        "aliases": aliases,
    }
    return tensors, structure


def restore(model: nn.Module, tensors: Mapping[str, Tensor], structure: Mapping[str, Any]) -> nn.Module:
    """Rebuild a quantized model from what :func:`payload` returned; its outputs have the same bits.

    Args:
        model: The float architecture with any weights, on any device (``meta`` too: then tensors stay on theirs).
            Changed in place; parameters take the stored dtype.
        tensors: Stored tensors, not copied where device and layout allow.
        structure: The description stored with them.

    Returns:
        ``model``, or the quantized operator itself when ``model`` is a single one.

    Raises:
        InputError: The structure is of another format, or tensors and model do not fit each other. Nothing is run.
    """
    if structure.get("format") != FORMAT:
        raise InputError("structure.format", f"is {structure.get('format')!r}, not {FORMAT}", "export the model again")
    aliases = structure.get("aliases", {})
    operators: dict[str, QuantizedOperator] = {}
    for entry in structure["operators"]:
        name = entry["name"]
        inner = operator_module(model, name)
        operators[name] = operator = _restored_operator(inner, entry, tensors, aliases)
        if inner is model:
            model = operator
        elif inner is not operator:
            replace_module(model, inner, operator)
    used = {_join(name, own) for name in operators for own in TENSORS}
    for entry in structure.get("stacks", ()):
        put(model, entry["name"], _restored_stack(model, entry, tensors, aliases))
        used.update(_join(entry["name"], own) for own in STACK_TENSORS)
    placed: dict[str, Tensor] = {}
    for name, old in list(_named_tensors(model, operators)):
        if name in used:
            continue
        key = aliases.get(name, name)
        if key not in tensors:
            raise InputError(name, "is not among the stored tensors", "give the skeleton the model was exported from")
        if tensors[key].shape != old.shape and isinstance(old, nn.Parameter):
            raise InputError(
                name,
                f"is stored with shape {tuple(tensors[key].shape)}, the model has {tuple(old.shape)}",
                "give the skeleton the model was exported from",
            )
        used.update((key, name))
        _place(model, name, operators, old, tensors[key], placed, key)
    left = [name for name in tensors if name not in used]
    if left:
        raise InputError(
            left[0], "is stored but the model has no such tensor", "give the skeleton it was exported from"
        )
    return model


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name, without those inside quantized operators; each quantized operator once."""
    inner = {id(m) for q in model.modules() if isinstance(q, QuantizedOperator) for m in q.inner.modules()}
    return ((name, m) for name, m in model.named_modules(remove_duplicate=False) if id(m) not in inner)


def _named_tensors(model: nn.Module, operators: Mapping[str, QuantizedOperator]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, tied ones under each name; the inner operator's names lose their ``inner.``."""
    for name, module in _modules(model):
        for part in (module._parameters, module._buffers):
            for leaf, tensor in part.items():
                if tensor is not None:
                    yield _join(name, leaf), tensor
        if name in operators:
            for source in (operators[name].inner.named_parameters, operators[name].inner.named_buffers):
                for leaf, tensor in source(remove_duplicate=False):
                    yield _join(name, leaf), tensor


def _restored_operator(
    inner: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> QuantizedOperator:
    if isinstance(inner, QuantizedOperator):  # one module under several names
        return inner
    name = entry["name"]
    full = {own: _join(name, own) for own in TENSORS}
    found = {own: tensors.get(aliases.get(full[own], full[own])) for own in TENSORS}
    if found["weight_values"] is None or found["weight_scale"] is None:
        raise InputError(name, "its quantized weight is not among the stored tensors", "give every file of the export")
    return QuantizedOperator(
        inner,
        OperatorPayload(**found),  # type: ignore[arg-type]  # the two that must be there are
        scheme=Scheme.parse(entry["scheme"]),
        kind=entry["kind"],
        transposed=entry["transposed"],
        execution=entry["execution"],
        dtype={"float32": torch.float32, "float64": torch.float64}[entry["dtype"]],
    )


def _restored_stack(
    model: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> QuantizedStack:
    name = entry["name"]
    try:
        weight = model.get_parameter(name)
    except AttributeError as error:
        raise InputError(name, "the model has no such parameter", "give the skeleton it was exported from") from error
    if list(weight.shape) != entry["shape"]:
        remedy = "give the skeleton the model was exported from"
        raise InputError(name, f"is stored with shape {entry['shape']}, the model has {list(weight.shape)}", remedy)
    found = [tensors.get(aliases.get(full, full)) for full in (_join(name, own) for own in STACK_TENSORS)]
    values, scale = found
    if values is None or scale is None:
        raise InputError(name, "its quantized weight is not among the stored tensors", "give every file of the export")
    device = weight.device if weight.device.type != "meta" else values.device
    dtypes = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return QuantizedStack(
        values.to(device), scale.to(device), shape=weight.shape, scheme=Scheme.parse(entry["scheme"]),
        transposed=entry["transposed"], dtype=dtypes[entry["dtype"]],
    )  # fmt: skip


def _place(
    model: nn.Module,
    name: str,
    operators: Mapping[str, QuantizedOperator],
    old: Tensor,
    new: Tensor,
    placed: dict[str, Tensor],
    key: str,
) -> None:
    """Put a stored tensor in the place of ``old``; names stored once become one tensor again."""
    owner, leaf = _owner(model, name, operators)
    if key not in placed:
        value = new if old.device.type == "meta" else new.to(old.device)
        keep = isinstance(old, nn.Parameter)
        placed[key] = nn.Parameter(value, requires_grad=old.requires_grad) if keep else value
    if leaf in owner._parameters:
        value = placed[key]
        owner._parameters[leaf] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = placed[key].detach()


def _owner(model: nn.Module, name: str, operators: Mapping[str, QuantizedOperator]) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        operator = operators.get(".".join(parts[:depth]))
        if operator is not None:
            return operator.inner.get_submodule(".".join(parts[depth:])), leaf
    return model.get_submodule(path), leaf


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf

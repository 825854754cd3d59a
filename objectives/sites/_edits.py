"""Parameter edits made from the labels of a propagation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from alphasmith.objectives.sites._propagation import Blocked, Role, Solution
from alphasmith.objectives.sites._weights import Operators, WeightKey
from alphasmith.objectives.sites.graph import Graph
from alphasmith.objectives.sites.types import ParameterEdit


def operator_edit(graph: Graph, key: WeightKey, role: Role, labels: Tensor) -> ParameterEdit:
    """Edit of an operator's weight along its inputs (power +1) or outputs (power -1).

    Args:
        graph: The traced call.
        key: The part of the weight that is read.
        role: ``in`` or ``out``.
        labels: (batch * channels,) int64 site channel of every input or output channel; negative = not scaled.
    """
    value = graph.values[key.parameter]
    axis = key.in_axis if role == "in" else key.out_axis
    per_channel = labels.clamp(min=-1).reshape(key.batch, -1)
    # Convolutions store channels of a group on one axis and the group on the other.
    grouped = key.conv and key.groups > 1 and (role == "in") != key.transposed
    if grouped:
        return ParameterEdit(
            parameter=value.name,
            channel=_grouped(value.shape, axis, key, per_channel[0]),
            power=1 if role == "in" else -1,
        )
    # Axes that are read whole broadcast; a part of an axis has to be spelled out.
    shape = [1] * len(value.shape)
    for a, (start, stop) in enumerate(key.region):
        if a in (axis, key.batch_axis) or (start, stop) != (0, value.shape[a]):
            shape[a] = value.shape[a]
    channel = torch.full(shape, -1, dtype=torch.int64)
    window = channel[tuple(slice(*span) if shape[a] > 1 else slice(None) for a, span in enumerate(key.region))]
    order = [1] * len(shape)
    order[axis] = per_channel.shape[1]
    if key.batch_axis is not None:
        order[key.batch_axis] = key.batch
        if key.batch_axis > axis:
            per_channel = per_channel.T
    window.copy_(per_channel.reshape(order).expand(window.shape))
    return ParameterEdit(parameter=value.name, channel=channel, power=1 if role == "in" else -1)


def _grouped(shape: tuple[int, ...], axis: int, key: WeightKey, labels: Tensor) -> Tensor:
    """Site channel of every (row, channel within its group) of a grouped convolution's weight, kernel axes broadcast."""
    other = 1 - axis
    per_group = shape[axis]
    group = torch.arange(shape[other]) // (shape[other] // key.groups)
    channel = labels[group[:, None] * per_group + torch.arange(per_group)]
    channel = channel if axis == 1 else channel.T
    return channel.reshape(*channel.shape, *([1] * (len(shape) - 2)))


def solution_edits(graph: Graph, solution: Solution) -> tuple[tuple[ParameterEdit, ...], tuple[str, ...]]:
    """All edits of a folded site, and the names of the modules that absorb 1/s."""
    edits = [operator_edit(graph, key, role, labels.reshape(-1)) for (key, role), labels in solution.weights.items()]
    for value, labels in solution.parameters.items():
        channel, offset = _compressed(labels.clamp(min=-1)), solution.offsets[value]
        edits.append(ParameterEdit(parameter=graph.values[value].name, channel=channel, power=-1, offset=offset))
    producers = dict.fromkeys(edit.parameter.rpartition(".")[0] for edit in edits if edit.power < 0)
    return tuple(edits), tuple(producers)


def _compressed(channel: Tensor) -> Tensor:
    """The smallest tensor that broadcasts to ``channel``."""
    for axis in range(channel.dim()):
        first = channel.narrow(axis, 0, min(1, channel.shape[axis]))
        if channel.shape[axis] > 1 and bool((channel == first).all()):
            channel = first
    return channel.clone()


def extended_over_stack(graph: Graph, operators: Operators, solution: Solution, routed: set[int]) -> Solution:
    """Give experts that the traced batch did not reach the input scales of those that it did.

    A loop over stacked experts reads one slice of the weight at a time, and only slices with tokens. The tensor they are
    routed from is scaled for all of them.

    Raises:
        Blocked: The experts that were reached number the channels differently.
    """
    weights = dict(solution.weights)
    for member in routed:
        keys = dict.fromkeys(use.key for use in operators.uses[member])
        sample = next(iter(keys))
        shape = graph.values[sample.parameter].shape
        stacked = [a for a in range(len(shape)) if a not in (sample.in_axis, sample.out_axis, sample.batch_axis)]
        if sample.conv or not stacked:
            continue
        labels = [weights.pop((key, "in")) for key in keys]
        if any(not torch.equal(labels[0], other) for other in labels):
            raise Blocked(f"the experts in {graph.values[sample.parameter].name} read different channels")
        region = tuple((0, shape[a]) if a in stacked else span for a, span in enumerate(sample.region))
        whole = WeightKey(sample.parameter, region, sample.batch_axis, sample.in_axis, sample.out_axis)
        weights[whole, "in"] = labels[0]
    return replace(solution, weights=weights)

"""Parameters that the traced call did not read: whose they are, and which tensors the layers that hold them could meet.

A branch that another batch takes may read a tensor whose scales are folded, or make one in its place. What a module's forward
had in hand during the traced call is known (``Graph.seen``), so only layers called from a forward that saw such a tensor are
suspected, and other parameters (a normalization, a mask token) where they have its number of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from alphasmith.objectives.sites._propagation import Blocked, Solution
from alphasmith.objectives.sites._weights import is_plain
from alphasmith.objectives.sites.graph import Graph
from alphasmith.objectives.sites.types import Operator

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class _Idle:
    """A module with parameters that the traced call did not read.

    Attributes:
        name: Its name.
        callers: Modules whose forward ran and could have called it, or used its parameters.
        sizes: Sizes of its parameters along every dimension; empty where it is a linear layer or a convolution.
    """

    name: str
    callers: frozenset[str]
    sizes: frozenset[int]


class Unread:
    """What the traced call did not read.

    Args:
        model: The model.
        graph: The traced call.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._graph = graph
        self._modules = dict(model.named_modules())
        first = {id(tensor): name for name, tensor in model.named_parameters()}
        names = {id(module): name for name, module in self._modules.items()}
        #: Canonical name of every parameter that was not read -> the modules that hold it.
        self.owners: dict[str, list[str]] = {}
        callers: dict[str, set[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            known = names[id(module)]
            held = [first[id(tensor)] for tensor in module.parameters(recurse=False)]
            idle = [name for name in held if name not in graph.parameters]
            if not idle or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue
            callers.setdefault(known, set()).add(_running(path, graph))
            for name in idle:
                if known not in self.owners.setdefault(name, []):
                    self.owners[name].append(known)
        self._idle = [self._described(name, self._modules[name], frozenset(found)) for name, found in callers.items()]

    def refuse(self, solution: Solution) -> None:
        """Require that no layer that was not reached could read, or stand in for, a tensor that shrinks.

        Raises:
            Blocked: One could.
        """
        channels = len(solution.ties)
        for idle in self._idle:
            # A matrix may read a part of a tensor, or several of them joined: its size excludes nothing.
            if idle.sizes and channels not in idle.sizes:
                continue
            if any(not solution.values.keys().isdisjoint(self._graph.seen.get(caller, ())) for caller in idle.callers):
                whose = idle.name or "the model"
                raise Blocked(f"{whose} could read or make it, in a branch that the example batch does not take")

    def operators(self) -> list[Operator]:
        """Linear and convolution layers that were not reached but run the library's own forward, with their own weight.

        Other batches may reach them, so their inputs can be calibrated and their weights quantized, without smoothing.
        """
        found = []
        for weight, owners in self.owners.items():
            module = self._modules[owners[0]]
            own = weight.rpartition(".")
            if len(owners) > 1 or own[2] != "weight" or own[0] != owners[0] or not _is_layer(module):
                continue
            found.append(_operator(owners[0], module))
        return found

    def _described(self, name: str, module: nn.Module, callers: frozenset[str]) -> _Idle:
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            return _Idle(name, callers, frozenset())
        idle = [t for n, t in module.named_parameters(name, recurse=False) if n not in self._graph.parameters]
        return _Idle(name, callers, frozenset({1, *(size for tensor in idle for size in tensor.shape)}))


def _running(path: str, graph: Graph) -> str:
    """The module itself where its forward ran, else the innermost one around it whose did: who would have called it."""
    while path and path not in graph.modules:
        path = path.rpartition(".")[0]
    return path


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a linear layer or convolution that multiplies its input as it comes, and is no parametrization's."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) and is_plain(module) and "weight" in module._parameters


def _operator(name: str, module: nn.Module) -> Operator:
    bias = None if module.bias is None else f"{name}.bias"
    if isinstance(module, nn.Linear):
        return Operator(
            name=name, weight=f"{name}.weight", bias=bias, kind="linear", transposed=False, raw=False,
            in_channels=module.in_features, out_channels=module.out_features,
        )  # fmt: skip
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"{name} is a {type(module).__name__}")
    return Operator(
        name=name, weight=f"{name}.weight", bias=bias, kind="conv", transposed=False, raw=False,
        in_channels=module.in_channels, out_channels=module.out_channels, kernel=tuple(module.kernel_size), groups=module.groups,
    )  # fmt: skip

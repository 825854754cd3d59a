"""One traced forward pass as a graph of values in single-assignment form.

The trace sees what really runs: aten operations, parameters by identity, in-place writes as new versions of a value.
Nothing is inferred from module names. Only what the traced call executed is in the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alphasmith.objectives.media.batch import Batch, call, unfused_attention

ValueKind = Literal["input", "parameter", "constant", "computed"]


@dataclass(frozen=True)
class Ref:
    """Stands for value ``index`` inside the arguments of a node."""

    index: int


@dataclass(kw_only=True)
class Value:
    """One version of one tensor.

    Attributes:
        index: Position in ``Graph.values``.
        shape: Its shape.
        floating: True for real floating dtypes: only these can carry a scale.
        kind: ``computed`` by a node, or a leaf: model input, parameter (or buffer), or a constant the model holds.
        producer: Index of the node that made it; None for leaves.
        name: Full name of a parameter or buffer, "" otherwise.
        opaque: Why its content cannot be followed ("" when it can).
        from_input: Depends on a model input.
        from_parameter: Depends on a parameter or buffer.
        packed: Its elements fill its memory from the start, in order.
        data: The tensor itself for integer and boolean values (indices, masks), while it is unchanged.
        readers: Indices of the nodes that read it, each once, in order.
    """

    index: int
    shape: tuple[int, ...]
    floating: bool
    kind: ValueKind
    producer: int | None = None
    name: str = ""
    opaque: str = ""
    from_input: bool = False
    from_parameter: bool = False
    packed: bool = False
    data: Tensor | None = None
    readers: list[int] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class Node:
    """One aten operation.

    Attributes:
        index: Position in ``Graph.nodes``.
        op: Name without namespace, overload and in-place underscore, e.g. ``add`` for ``aten::add_.Tensor``.
        func: The operation itself.
        args: Positional arguments with ``Ref`` in place of tensors.
        kwargs: Keyword arguments, likewise.
        arguments: All arguments by schema name, defaults included.
        inputs: Values read, each once.
        outputs: Values made, in schema order; None where the operation returned no tensor.
        module: Dotted name of the innermost module whose ``forward`` ran it ("" = the model itself).
        given: Values that this module was called with.
    """

    index: int
    op: str
    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    module: str
    given: frozenset[int] = frozenset()

    @property
    def out(self) -> int:
        """The first output; -1 when the operation returned no tensor."""
        first = self.outputs[0] if self.outputs else None
        return -1 if first is None else first

    def value(self, name: str) -> int | None:
        """Index of the tensor argument ``name``, or None when it is absent or not a tensor."""
        argument = self.arguments.get(name)
        return argument.index if isinstance(argument, Ref) else None


@dataclass(kw_only=True)
class Graph:
    """The traced call.

    Attributes:
        nodes: Operations in the order in which they ran.
        values: Every version of every tensor.
        parameters: Value index of each parameter and buffer that was read, by canonical (first) name.
        outputs: Values the model returned.
        modules: Module names (first name of each module object) that ran.
        seen: Module name -> values that its forward had in hand: what it was called with, what it and those it called made.
        pinned: Canonical name -> why a parameter must not be edited.
    """

    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    outputs: set[int] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    seen: dict[str, set[int]] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)

    def producer(self, value: int) -> Node | None:
        """The node that made ``value``, or None for a leaf."""
        index = self.values[value].producer
        return None if index is None else self.nodes[index]


def substitute(argument: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every leaf of nested lists and tuples, keeping their structure."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(substitute(item, function) for item in argument)
    return function(argument)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Tensors inside tuples, lists, mappings and dataclasses.

    Other objects are not searched: a key-value cache is state that the same model writes and reads, so scaling what
    goes in and what comes out alike is no change of its output.
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from tensors_in(item)
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for entry in dataclasses.fields(output):
            yield from tensors_in(getattr(output, entry.name))


def trace(model: nn.Module, batch: Batch) -> Graph:
    """Run ``model`` once on ``batch`` and return what it did.

    Args:
        model: In eval mode. Unchanged afterwards; hooks are removed.
        batch: One tiny batch; every intermediate tensor is kept alive until the call returns.

    Returns:
        The graph. Float tensors are not kept in it.
    """
    recorder = _Recorder(model, batch)
    with unfused_attention(), torch.no_grad(), recorder.module_hooks(), recorder, _Exits(recorder.leave):
        output = call(model, batch)
    return recorder.finish(output)


class _Recorder(TorchDispatchMode):
    """Builds the graph while operations run. Tensors are kept alive so that their ``id`` stays theirs."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        # the base class is untyped; the annotation is what strict type checking asks for
        initialise: Callable[[], None] = super().__init__
        initialise()
        self.graph = Graph()
        self._model = model
        self._stack: list[tuple[str, frozenset[int]]] = []
        self._alive: dict[int, Tensor] = {}
        self._current: dict[int, int] = {}
        self._storages: dict[int, list[int]] = {}
        self._parameter_names, self._parameter_storages = self._name_parameters(model)
        self._inputs = {id(t) for t in tensors_in((batch.args, batch.kwargs))}

    def _name_parameters(self, model: nn.Module) -> tuple[dict[int, str], dict[int, list[str]]]:
        names: dict[int, str] = {}
        storages: dict[int, list[str]] = {}
        persistent = model.state_dict(keep_vars=True).keys()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) in names:
                continue
            names[id(tensor)] = name
            self._alive[id(tensor)] = tensor
            key = _storage_key(tensor)
            if key is not None:
                storages.setdefault(key, []).append(name)
            if name not in persistent:
                self.graph.pinned[name] = f"{name} is not saved with the model"
        for shared in storages.values():
            if len(shared) > 1:
                for name in shared:
                    self.graph.pinned[name] = f"{name} shares memory with {', '.join(n for n in shared if n != name)}"
        return names, storages

    def module_hooks(self) -> _ModuleHooks:
        """Context that keeps the stack of running modules."""
        return _ModuleHooks(self._model, self._stack, self.graph, self._lookup)

    def leave(self, tensor: Tensor) -> None:
        """Note that ``tensor`` is read by something that is not an operation: what becomes of it is unknown."""
        value = self.graph.values[self._lookup(tensor)]
        value.opaque = "read outside torch"
        if value.name:
            self.graph.pinned[value.name] = f"{value.name} is read outside torch"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            # Inference mode hands composite operations over whole; their parts are what the rules know.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        seen: dict[int, None] = {}

        def refer(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            index = self._lookup(argument)
            seen[index] = None
            return Ref(index)

        ref_args = substitute(args, refer)
        ref_kwargs = {name: substitute(value, refer) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, ref_args, ref_kwargs, tuple(seen), result)
        return result

    def _record(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ref_args: tuple[Any, ...],
        ref_kwargs: dict[str, Any],
        inputs: tuple[int, ...],
        result: Any,
    ) -> None:
        graph = self.graph
        schema = func._schema
        arguments: dict[str, Any] = {}
        written: list[Tensor] = []
        for position, argument in enumerate(schema.arguments):
            given = position < len(args)
            arguments[argument.name] = (
                ref_args[position] if given else ref_kwargs.get(argument.name, argument.default_value)
            )
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.extend(tensors_in(args[position] if given else kwargs.get(argument.name)))
        index = len(graph.nodes)
        for tensor in written:
            self._forget_aliases(tensor)
        returned = result if isinstance(result, (list, tuple)) else (result,)
        outputs: list[int | None] = []
        for item in returned:
            if isinstance(item, Tensor):
                outputs.append(self._define(item, index, inputs))
            elif isinstance(item, (list, tuple)):
                outputs.extend(self._define(t, index, inputs) for t in item if isinstance(t, Tensor))
            else:
                outputs.append(None)
        for tensor in written:
            if all(tensor is not item for item in tensors_in(returned)):
                self._define(tensor, index, inputs, opaque="written in place by an operation that does not return it")
        name = schema.name.rsplit("::", 1)[-1]
        node = Node(
            index=index,
            op=name[:-1] if written and name.endswith("_") else name,
            func=func,
            args=ref_args,
            kwargs=ref_kwargs,
            arguments=arguments,
            inputs=inputs,
            outputs=tuple(outputs),
            module=self._stack[-1][0] if self._stack else "",
            given=self._stack[-1][1] if self._stack else frozenset(),
        )
        graph.nodes.append(node)
        graph.seen.setdefault(node.module, set()).update(inputs, (o for o in outputs if o is not None))
        for value in inputs:
            graph.values[value].readers.append(index)

    def _lookup(self, tensor: Tensor) -> int:
        index = self._current.get(id(tensor))
        if index is not None:
            return index
        name = self._parameter_names.get(id(tensor), "")
        kind: ValueKind = "parameter" if name else "input" if id(tensor) in self._inputs else "constant"
        opaque = ""
        key = _storage_key(tensor)
        if kind == "constant" and key in self._parameter_storages:
            # Reading a parameter through ``.data`` or another tensor hides the reader from the graph.
            opaque = "a parameter read through another tensor"
            for shared in self._parameter_storages[key]:
                self.graph.pinned[shared] = f"{shared} is also read through another tensor"
        elif kind == "constant":
            # ``.data`` and memory lent to other libraries come back as tensors that no operation made.
            for other in self._storages.get(key, ()) if key is not None else ():
                opaque = self.graph.values[self._current[other]].opaque = "read through another tensor"
        index = self._add(tensor, kind=kind, name=name, opaque=opaque)
        self.graph.values[index].from_input = kind == "input" or opaque == "read through another tensor"
        self.graph.values[index].from_parameter = (
            kind == "parameter" or opaque == "a parameter read through another tensor"
        )
        if name:
            self.graph.parameters[name] = index
        return index

    def _define(self, tensor: Tensor, node: int, inputs: tuple[int, ...], opaque: str = "") -> int:
        index = self._add(tensor, kind="computed", opaque=opaque)
        value = self.graph.values[index]
        value.producer = node
        value.from_input = any(self.graph.values[i].from_input for i in inputs)
        value.from_parameter = any(self.graph.values[i].from_parameter for i in inputs)
        return index

    def _add(self, tensor: Tensor, *, kind: ValueKind, name: str = "", opaque: str = "") -> int:
        index = len(self.graph.values)
        floating = tensor.is_floating_point()
        value = Value(index=index, shape=tuple(tensor.shape), floating=floating, kind=kind, name=name, opaque=opaque)
        if tensor.layout is torch.strided:
            value.packed = tensor.is_contiguous() and not tensor.storage_offset()
        value.data = None if floating or tensor.is_complex() else tensor
        self.graph.values.append(value)
        self._alive[id(tensor)] = tensor
        if self._current.get(id(tensor)) is None:
            key = _storage_key(tensor)
            if key is not None:
                self._storages.setdefault(key, []).append(id(tensor))
        self._current[id(tensor)] = index
        return index

    def _forget_aliases(self, tensor: Tensor) -> None:
        """After a write, older data is stale and every other tensor on the same memory has unknown content."""
        key = _storage_key(tensor)
        for name in self._parameter_storages.get(key, ()) if key is not None else ():
            self.graph.pinned[name] = f"{name} is written during the forward pass"
        for other in self._storages.get(key, ()) if key is not None else (id(tensor),):
            old = self.graph.values[self._current[other]]
            old.data = None
            if other != id(tensor):
                value = self._add(self._alive[other], kind="constant", opaque="changed in place through a view")
                self.graph.values[value].from_input = True

    def finish(self, output: Any) -> Graph:
        """Mark the outputs, let go of all tensors but indices, and return the graph."""
        graph = self.graph
        self._pin_half_seen()
        graph.outputs = {self._current[id(t)] for t in tensors_in(output) if id(t) in self._current}
        self._alive.clear()
        return graph

    def _pin_half_seen(self) -> None:
        """A parameter that a module shares with one that did not run has a reader that nobody has seen."""
        owners: dict[int, list[str]] = {}
        for path, module in self._model.named_modules():
            if not isinstance(module, (nn.ParameterList, nn.ParameterDict)):
                for tensor in module.parameters(recurse=False):
                    owners.setdefault(id(tensor), []).append(path)
        for key, paths in owners.items():
            idle = [path for path in paths if path not in self.graph.modules]
            if len(paths) > 1 and idle:
                name = self._parameter_names[key]
                self.graph.pinned.setdefault(
                    name, f"{name} is shared with {idle[0]}, which the example batch does not reach"
                )


#: Calls through which the content of a tensor reaches Python or another library without an operation being recorded.
_EXITS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__})


class _Exits(TorchFunctionMode):
    """Reports tensors that leave torch while it is entered."""

    def __init__(self, leave: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._leave = leave

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _EXITS and isinstance(args[0], Tensor):
            self._leave(args[0])
        return func(*args, **(kwargs or {}))


class _ModuleHooks:
    """Keeps the stack of running modules, and what each was called with, while it is entered."""

    def __init__(
        self, model: nn.Module, stack: list[tuple[str, frozenset[int]]], graph: Graph, lookup: Callable[[Tensor], int]
    ) -> None:
        self._model = model
        self._stack = stack
        self._graph = graph
        self._lookup = lookup
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._push(name), prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._pop, always_call=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _push(self, name: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = frozenset(self._lookup(tensor) for tensor in tensors_in((args, kwargs)))
            self._see(given)
            self._stack.append((name, given))
            self._see(given)
            self._graph.modules.add(name)

        return hook

    def _pop(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._stack.pop()
        self._see(frozenset(self._lookup(tensor) for tensor in tensors_in(output)))

    def _see(self, values: frozenset[int]) -> None:
        """Note what the forward that runs now has in hand."""
        if self._stack:
            self._graph.seen.setdefault(self._stack[-1][0], set()).update(values)


def _storage_key(tensor: Tensor) -> int | None:
    """Identity of the memory behind ``tensor`` while it is alive; None for layouts without one."""
    if tensor.layout is not torch.strided:
        return None
    return int(tensor.untyped_storage()._cdata)

"""Calls of a model's modules: intercepted, compared, and traced for what they read, take and leave behind.

A module counts as a function of its input and of the tensors it reads when one traced forward shows that it leaves no
attribute, buffer or argument changed, and takes and returns tensors, numbers and plain collections of them. Tensors that it
reads from elsewhere in the model are learned in the same forward.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphasmith.objectives.quantization.candidate_model import CandidateModel

#: A call of a module: its name, and how often it was called before in the same forward.
CallKey: TypeAlias = tuple[str, int]
#: Integers as wide as an element, to compare floats by their bits: 0.0 and -0.0 differ, a NaN equals itself.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class ModelCalls:
    """What a traced forward showed of a model.

    Attributes:
        names: Modules whose calls are listened to.
        wanted: Calls worth keeping, as many as the budget holds.
        reads: Module -> modules whose tensors it read, itself and its parts among them.
    """

    names: frozenset[str] = frozenset()
    wanted: frozenset[CallKey] = frozenset()
    reads: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def affected(self, model: nn.Module, changed: Collection[nn.Module]) -> frozenset[str]:
        """Those of ``names`` that hold or read a tensor of the changed modules."""
        identities = {id(module) for module in changed}
        owners = {name for name, module in model.named_modules() if id(module) in identities}
        return frozenset(
            name
            for name, module in model.named_modules()
            if name in self.names
            and (
                any(id(part) in identities for part in module.modules())
                or not owners.isdisjoint(self.reads.get(name, ()))
            )
        )


class Listener(Protocol):
    """Told of every call of a module, makes the call or something in its place."""

    def call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of ``forward(*args, **kwargs)``."""
        ...


@contextmanager
def intercepted(model: nn.Module, names: frozenset[str], listener: Listener) -> Iterator[None]:
    """Tell a listener of every call of these modules inside a ``with`` block."""
    put: list[tuple[dict[str, Any], Any]] = []
    try:
        for name, module in model.named_modules():
            if name in names:
                own = vars(module)
                put.append((own, own.get("forward")))
                own["forward"] = partial(listener.call, name, module.forward)
        yield
    finally:
        for own, before in reversed(put):
            del own["forward"]
            if before is not None:
                own["forward"] = before


def traced(candidate: CandidateModel, forward: Callable[[], Tensor], budget: int) -> ModelCalls:
    """Run a candidate once and find out what of it may be kept, and as much of that as fits."""
    model, operators = candidate.model, candidate.operators
    names = _listened(model, operators)
    trace = _Trace(model, names, operators)
    before = _random_states()
    with intercepted(model, frozenset(names), trace), trace.reads:
        forward()
    # Leaving out a draw would change all later ones.
    if trace.reads.generator or not all_same(before, _random_states()):
        return ModelCalls()
    return ModelCalls(frozenset(names), trace.wanted(budget), trace.read)


def _random_states() -> list[Tensor]:
    """States of the global generators of every device in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _listened(model: nn.Module, operators: Collection[nn.Module]) -> dict[str, nn.Module]:
    """Modules worth listening to: those that hold operators, or weights of another kind, and are called as modules."""
    inside = {id(part) for operator in operators for part in operator.modules()} - {id(o) for o in operators}
    heavy = {id(o) for o in operators}
    heavy |= {
        id(module)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        and any(t is not None and t.dim() > 1 for t in module._parameters.values())
    }
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and id(module) not in inside
        and not isinstance(module, torch.jit.ScriptModule)
        and any(id(part) in heavy for part in module.modules())
        # Hooks inside it, beyond its own, would not be called.
        and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module)
    }


@dataclass(eq=False)
class _Call:
    """A call as the trace saw it."""

    key: CallKey
    depth: int
    outer: _Call | None
    function: bool = True
    read: set[str] = field(default_factory=set)
    sizes: dict[int, int] = field(default_factory=dict)


class _Trace:
    """A listener that changes nothing and notes what every call reads, takes and leaves behind.

    Attributes:
        read: Module -> modules whose tensors it read.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], operators: Collection[nn.Module]) -> None:
        self._modules, self._operators = modules, {id(o) for o in operators}
        self._calls: Counter[str] = Counter()
        self._made: list[_Call] = []
        self._open: list[_Call] = []
        self._numbers = itertools.count()
        self._serials: dict[int, int] = {}
        self.read: dict[str, frozenset[str]] = {}
        owners = {id(t): name for name, module in model.named_modules() for t in _tensors(module) if t is not None}
        self.reads = _Reads(owners, self._open)

    def call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See :class:`Listener`."""
        key = (name, self._calls[name])
        self._calls[name] += 1
        for outer in self._open:
            outer.read.add(name)
        made = _Call(key, len(self._open), self._open[-1] if self._open else None)
        inputs, before = flat((args, kwargs)), self._state(name)
        versions = [t._version for t in inputs or () if isinstance(t, Tensor)]
        self._open.append(made)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._open.pop()
        outputs, after = flat(output, records=True), flat((args, kwargs))
        made.function = made.function and inputs is not None and outputs is not None and after is not None
        made.function = made.function and _identical(before, self._state(name)) and _identical(inputs, after)
        made.function = made.function and versions == [t._version for t in inputs or () if isinstance(t, Tensor)]
        made.sizes.update(self._size(t) for t in (*(inputs or ()), *(outputs or ())) if isinstance(t, Tensor))
        self.read[name] = self.read.get(name, frozenset()) | made.read
        if made.outer is not None:
            made.outer.read |= made.read
        self._made.append(made)
        return output

    def wanted(self, budget: int) -> frozenset[CallKey]:
        """Calls to keep, outer ones first, until the budget is spent."""
        never = {made.key[0] for made in self._made if not made.function}
        seen: set[int] = set()
        found: list[CallKey] = []
        for made in sorted(self._made, key=lambda call: call.depth):
            name = made.key[0]
            if name in never or self._says_no_more(made, never):
                continue
            size = sum(nbytes for serial, nbytes in made.sizes.items() if serial not in seen)
            if size <= budget:
                budget -= size
                seen.update(made.sizes)
                found.append(made.key)
        return frozenset(found)

    def _says_no_more(self, made: _Call, never: Collection[str]) -> bool:
        """Whether the call around it reads the same tensors, so that one of them is never known without the other."""
        outer = made.outer
        if outer is None or outer.key[0] in never:
            return False
        return self._owners(made.key[0]) == self._owners(outer.key[0])

    def _owners(self, name: str) -> set[int]:
        return {id(part) for part in self._modules[name].modules() if any(t is not None for t in _tensors(part))}

    def _state(self, name: str) -> tuple[Any, ...]:
        """Everything a call might leave behind in a module or its parts; operators are known to leave nothing."""
        found: list[Any] = []
        for part in self._modules[name].modules():
            if id(part) in self._operators:
                continue
            own = vars(part)
            for registry in (own, part._parameters, part._buffers):
                for key, value in registry.items():
                    found += (key, value, _mark(value))
        return tuple(found)

    def _size(self, tensor: Tensor) -> tuple[int, int]:
        """A number for a tensor's storage, which no other of this forward has, and its bytes."""
        storage = tensor.untyped_storage()
        # A storage keeps its Python object as long as it lives, so the object's id stands for it.
        if id(storage) not in self._serials:
            self._serials[id(storage)] = next(self._numbers)
            weakref.finalize(storage, self._serials.pop, id(storage)).atexit = False
        return self._serials[id(storage)], storage.nbytes()


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]  # torch annotates neither of the two
    """Notes, for all open calls, whose tensors an operation reads.

    Attributes:
        generator: Whether a generator of the model's own was drawn from.

    Args:
        owners: id of a tensor of the model -> the module that holds it.
        open_calls: Calls in progress, the innermost last.
    """

    def __init__(self, owners: Mapping[int, str], open_calls: list[_Call]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._owners, self._open = owners, open_calls
        self.generator = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` unchanged."""
        read = {self._owners[id(value)] for value in tree_leaves((args, kwargs)) if id(value) in self._owners}
        self.generator = self.generator or bool(kwargs and kwargs.get("generator") is not None)
        for call in self._open:
            call.read |= read
        return func(*args, **(kwargs or {}))


def _tensors(module: nn.Module) -> tuple[Tensor | None, ...]:
    """Tensors that a module itself holds."""
    return (*module._parameters.values(), *module._buffers.values())


def _mark(value: Any) -> int | None:
    """What changes when a value is changed in place, as far as it is cheap to see."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return len(value) if isinstance(value, (list, dict, set)) else None


def _identical(before: Sequence[Any] | None, after: Sequence[Any] | None) -> bool:
    """Whether two lists hold the very same objects, or equal numbers and texts."""
    if before is None or after is None or len(before) != len(after):
        return False
    return all(
        a is b or (isinstance(a, _CONSTANTS) and type(a) is type(b) and a == b)
        for a, b in zip(before, after, strict=True)
    )


def flat(value: Any, *, records: bool = False) -> tuple[Any, ...] | None:
    """Tensors, constants and the shapes of the collections that hold them; None where there is anything else.

    Args:
        value: What a module takes or returns.
        records: Whether dataclasses are collections, too: as an output they are; as an input they may be a state to write to.
    """
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_inference()
        return (value,) if plain and value.element_size() in _BITS else None
    if isinstance(value, _CONSTANTS):
        return (value,)
    keys: tuple[Any, ...]
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        keys, items = (len(value),), tuple(value)
    elif records and is_dataclass(value) and not isinstance(value, type):
        keys = tuple(entry.name for entry in fields(value))
        items = tuple(getattr(value, key) for key in keys)
    elif type(value) is dict:
        keys, items = tuple(value), tuple(value.values())
    else:
        return None
    found: list[Any] = [repr((type(value), keys))]
    for item in items:
        inner = flat(item, records=records)
        if inner is None:
            return None
        found += inner
    return tuple(found)


def copied(value: Any) -> Any:
    """The same tensors in collections of their own."""
    if isinstance(value, (Tensor, *_CONSTANTS)):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(copied(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{entry.name: copied(getattr(value, entry.name)) for entry in fields(value)})
    return {key: copied(item) for key, item in value.items()}


def all_same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two flat collections are the same to the bit."""
    return len(left) == len(right) and all(map(same, left, right))


def same(left: Any, right: Any) -> bool:
    """Whether two tensors have the same bits in the same order of memory, or two other values are equal."""
    if left is right:
        return True
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return type(left) is type(right) and bool(left == right)
    if (left.dtype, left.device, left.shape, left.stride()) != (right.dtype, right.device, right.shape, right.stride()):
        return False
    bits = _BITS[left.element_size()]
    return torch.equal(left.view(bits), right.view(bits))


def storage_of(tensor: Tensor) -> tuple[tuple[torch.device, int], int]:
    """A tensor's memory: where it is while it lives, and its bytes."""
    storage = tensor.untyped_storage()
    return (tensor.device, storage.data_ptr()), storage.nbytes()

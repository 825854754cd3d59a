"""Which values shrink along with a site's input: labels, ties, and the worklist that makes them consistent.

Symbols: C channels of the site, s (C,) its scales. A label says what happens to one element of a value when the site's
input X becomes X / s: ``c >= 0`` it becomes 1/s_c of what it was; ``NONE`` it does not change; ``ANY`` it is exactly
zero, so that every label is true of it. Labels of a value have the value's own shape, so views, head splits, window
partitions and fused projections need no special cases: the same operation moves the labels.

Labels only grow (NONE < ANY < c). An operation's rule (``rules.py``) makes the labels around it consistent or raises
``Blocked``; when nothing changes any more, every operation that touches a label has been checked with the final
labels, which is the proof that the scales cancel. Two labels on one element tie their channels to one scale.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from alphasmith.objectives.sites._weights import Operators, Use, WeightKey
from alphasmith.objectives.sites.graph import Graph, Node, Ref, substitute

NONE, ANY = -2, -1

#: Operations whose output is zero everywhere.
ZEROS = frozenset({"zeros", "zeros_like", "new_zeros", "zero"})
_FILLS = frozenset({"full", "full_like", "new_full", "scalar_tensor", "fill"})
_SPLITTERS = frozenset({"split", "split_with_sizes", "unbind", "chunk"})
_ZERO_KEEPERS = frozenset(
    {"expand", "view", "_unsafe_view", "clone", "_to_copy", "slice", "select", "unsqueeze", "repeat"}
)

#: Rule visits after which a site is given up, so that a hostile graph costs seconds, not hours.
_VISITS = 20_000
#: Wrong guesses allowed at products of two values.
_GUESSES = 64

Role = Literal["in", "out"]
Rule = Callable[["Solver", Node], "list[Alternative] | None"]


class Blocked(Exception):
    """The scales cannot be folded; the message is the reason shown to the user."""


@dataclass(frozen=True)
class Alternative:
    """One way to make a product's output shrink: let ``value`` shrink, whose elements ``index`` maps the output to."""

    value: int
    index: Tensor | None


@dataclass
class _State:
    """Everything a guess may have to take back. Tensors in it are never written in place."""

    labels: dict[int, Tensor] = field(default_factory=dict)
    offsets: dict[int, float] = field(default_factory=dict)
    weights: dict[tuple[WeightKey, Role], Tensor] = field(default_factory=dict)
    canon: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    tied: bool = False
    queue: deque[int] = field(default_factory=deque)
    waiting: set[int] = field(default_factory=set)
    choices: dict[int, None] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(
            dict(self.labels),
            dict(self.offsets),
            dict(self.weights),
            self.canon,
            self.tied,
            deque(self.queue),
            set(self.waiting),
            dict(self.choices),
        )


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A consistent labelling.

    Attributes:
        ties: (C,) int64, the smallest channel that each channel shares its scale with.
        weights: (batch, channels) int64 labels of operator weights; role ``in`` grows by s, role ``out`` shrinks.
        parameters: Labels of all other parameters by value index, in the parameter's shape; they shrink.
        offsets: Constant added to a parameter before it is used (1.0 for (1 + w) norms).
        values: Labels of all computed values that shrink, by value index, in the value's shape.
    """

    ties: Tensor
    weights: dict[tuple[WeightKey, Role], Tensor]
    parameters: dict[int, Tensor]
    offsets: dict[int, float]
    values: dict[int, Tensor]


class Solver:
    """Solves one site of one graph.

    Args:
        graph: The traced call.
        operators: Its operators.
        members: Indices of the operators that belong to the site; no other may read a scaled value.
        channels: C.
        rules: Rule of each operation by name.
        context: Module name -> words for the user about what the module is ("the normalization x"), or "".
    """

    def __init__(
        self,
        graph: Graph,
        operators: Operators,
        members: Iterable[int],
        channels: int,
        rules: dict[str, Rule],
        context: Callable[[Node], str],
    ) -> None:
        self.graph = graph
        self.operators = operators
        self.context = context
        self._members = frozenset(members)
        self._channels = channels
        self._rules = rules
        self._state = _State(canon=torch.arange(channels, dtype=torch.int32))
        self._visits = 0
        self._guesses = 0

    # -- reading and writing labels -------------------------------------------------------------------------------

    def labels(self, value: int) -> Tensor:
        """Labels of ``value`` in its shape, int32; tied channels carry their smallest member."""
        stored = self._state.labels.get(value)
        if stored is not None:
            return self._canonical(stored)
        return torch.full((), NONE, dtype=torch.int32).expand(self.graph.values[value].shape)

    def labelled(self, value: int | None) -> bool:
        """Whether any element of ``value`` shrinks."""
        return value is not None and value in self._state.labels

    def offset(self, value: int) -> float:
        """The constant o such that ``value + o`` is what shrinks; 0.0 for nearly all values."""
        return self._state.offsets.get(value, 0.0)

    def is_zero(self, value: int) -> bool:
        """Whether ``value`` is zero everywhere, whatever the batch."""
        node = self.graph.producer(value)
        while node is not None and node.op in _ZERO_KEEPERS and isinstance(node.args[0], Ref):
            value = node.args[0].index
            node = self.graph.producer(value)
        if node is None or self.graph.values[value].opaque:
            return False
        if node.op in _FILLS:
            filled = [node.arguments[name] for name in ("fill_value", "s", "value") if name in node.arguments]
            return not any(isinstance(item, Ref) for item in filled) and filled == [0]
        return node.op in ZEROS

    def put(self, value: int, labels: Tensor, offset: float = 0.0) -> None:
        """Add labels to ``value`` and queue the operations around it.

        Raises:
            Blocked: The value cannot shrink, or its labels say otherwise.
        """
        if not bool((labels >= 0).any()):
            return
        record = self.graph.values[value]
        old = self._state.labels.get(value)
        if old is None:
            self._refuse_unscalable(value)
            self._state.offsets[value] = offset
        elif self._state.offsets[value] != offset:
            raise Blocked(f"{record.name or 'a value'} is used both with and without a constant added")
        merged = self.merge(self.labels(value), labels)
        if old is not None and torch.equal(merged, self._canonical(old)):
            return
        self._state.labels[value] = merged.contiguous()
        if record.producer is not None:
            self._push(record.producer)
        for reader in record.readers:
            self._push(reader)

    def _refuse_unscalable(self, value: int) -> None:
        record = self.graph.values[value]
        if record.opaque:
            raise Blocked(record.opaque)
        if not record.floating:
            raise Blocked("an integer tensor would have to be scaled")
        if value in self.graph.outputs:
            raise Blocked("it is also an output of the model")
        if record.kind == "input":
            raise Blocked("it comes straight from the model's input")
        if record.kind == "constant":
            raise Blocked("it comes from a constant that is not saved with the model")
        if record.kind == "parameter":
            self._refuse_pinned(value)
            if value in self.operators.by_parameter:
                raise Blocked(f"{record.name} is used both as a weight and as data")
        # Looking at the readers before following them saves walking through a whole residual stream in vain.
        for reader in record.readers:
            use = self.operators.by_node.get(reader)
            if use is not None and use.x == value:
                self.require_member(use)

    def _refuse_pinned(self, parameter: int) -> None:
        name = self.graph.values[parameter].name
        if name in self.graph.pinned:
            raise Blocked(self.graph.pinned[name])
        if parameter in self.graph.outputs:
            raise Blocked(f"{name} is also an output of the model")

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Elementwise union of two labellings; where they disagree the channels are tied."""
        a, b = self._canonical(a), self._canonical(b)
        conflict = (a >= 0) & (b >= 0) & (a != b)
        if bool(conflict.any()):
            self._tie(a[conflict], b[conflict])
            a, b = self._canonical(a), self._canonical(b)
        return torch.maximum(a, b)

    def collapse(self, labels: Tensor, index: Tensor, size: int) -> Tensor:
        """(size,) labels of the targets that elements map to; elements that share a target are tied.

        Args:
            labels: (n,) labels of elements.
            index: (n,) target of each element, -1 for none.
            size: Number of targets.
        """
        labels = self._canonical(labels)
        valid = (labels >= 0) & (index >= 0)
        target, label = index[valid].long(), labels[valid]
        result = torch.full((size,), NONE, dtype=torch.int32)
        # scatter_reduce with amax: deterministic whichever order the elements come in
        result.scatter_reduce_(0, target, label, "amax")
        conflict = result[target] != label
        if bool(conflict.any()):
            self._tie(result[target][conflict], label[conflict])
            result = self._canonical(result)
        return result

    def _canonical(self, labels: Tensor) -> Tensor:
        if not self._state.tied:
            return labels
        canon = self._state.canon
        return torch.where(labels >= 0, canon[labels.clamp(min=0).long()], labels)

    def _tie(self, a: Tensor, b: Tensor) -> None:
        parent = self._state.canon.tolist()

        def root(channel: int) -> int:
            while parent[channel] != channel:
                channel = parent[channel]
            return channel

        for left, right in torch.unique(torch.stack((a, b), 1), dim=0).tolist():
            x, y = root(left), root(right)
            parent[max(x, y)] = min(x, y)
        flat = [root(channel) for channel in range(len(parent))]
        if self._channels > 1 and not any(flat):
            raise Blocked("all channels would have to share one scale")
        self._state.canon = torch.tensor(flat, dtype=torch.int32)
        self._state.tied = True

    # -- relations that rules are made of --------------------------------------------------------------------------

    def link(self, big: int, small: int, index: Tensor | None = None, *, carry_offset: bool = False) -> None:
        """Make labels equal: element e of ``big`` has the label of element ``index[e]`` of ``small``.

        Args:
            big: A value.
            small: A value.
            index: Shape of ``big``: flat position in ``small``, or -1 where ``big`` is exactly zero. None: the same shape
                element by element.
            carry_offset: Also carry a constant offset (only for pure data movement).
        """
        if not (self.labelled(big) or self.labelled(small)) or self.is_zero(big) or self.is_zero(small):
            return
        offset = self.offset(big) or self.offset(small)
        if offset and (not carry_offset or (index is not None and bool((index < 0).any()))):
            raise Blocked("a constant is added to it")
        big_labels, small_labels = self.labels(big), self.labels(small)
        if index is None:
            merged = self.merge(big_labels, small_labels.reshape(big_labels.shape))
            self.put(big, merged, offset)
            self.put(small, merged.reshape(small_labels.shape), offset)
            return
        flat = index.reshape(-1)
        gathered = self.collapse(big_labels.reshape(-1), flat, small_labels.numel()).reshape(small_labels.shape)
        small_labels = self.merge(small_labels, gathered)
        self.put(small, small_labels, offset)
        moved = torch.full(flat.shape, ANY, dtype=torch.int32)
        inside = flat >= 0
        if small_labels.numel():
            moved[inside] = small_labels.reshape(-1)[flat[inside].long()]
        self.put(big, moved.reshape(index.shape), offset)

    def link_broadcast(self, out: int, operand: int) -> None:
        """``link`` an operand of an elementwise operation to its output, with broadcasting."""
        self.link(out, operand, self.broadcast_index(out, operand))

    def broadcast_index(self, out: int, operand: int) -> Tensor | None:
        """Position in ``operand`` of every element of ``out``; None when the shapes are equal."""
        shape, target = self.graph.values[operand].shape, self.graph.values[out].shape
        if shape == target:
            return None
        return torch.arange(self.graph.values[operand].numel).reshape(shape).expand(target)

    def vector(self, value: int, index: Tensor, known: Tensor) -> Tensor:
        """Labels of ``value`` gathered along ``index`` (its shape), merged with the ``known`` labels of the targets."""
        found = self.collapse(self.labels(value).reshape(-1), index.reshape(-1), known.numel())
        return self.merge(known.reshape(-1), found)

    def spread(self, value: int, index: Tensor, vector: Tensor, offset: float = 0.0) -> None:
        """Give every element of ``value`` the label of its target in ``vector``."""
        self.put(value, self._canonical(vector)[index.reshape(-1)].reshape(index.shape), offset)

    # -- operators ---------------------------------------------------------------------------------------------------

    def weight(self, key: WeightKey, role: Role) -> Tensor:
        """(batch * channels,) labels of an operator's weight along its inputs or outputs."""
        size = key.batch * (key.in_channels if role == "in" else key.out_channels)
        stored = self._state.weights.get((key, role))
        return torch.full((size,), NONE, dtype=torch.int32) if stored is None else self._canonical(stored)

    def put_weight(self, key: WeightKey, role: Role, vector: Tensor) -> None:
        """Scale a weight along its inputs (grow by s) or outputs (shrink by s).

        Raises:
            Blocked: Something else reads the weight.
        """
        if not bool((vector >= 0).any()):
            return
        if (key, role) not in self._state.weights:
            self.guard_weight(key)
        elif torch.equal(self.weight(key, role), self._canonical(vector)):
            return
        self._state.weights[key, role] = vector
        for use in self.operators.by_parameter[key.parameter]:
            if use.key == key:
                self._push(use.node)

    def guard_weight(self, key: WeightKey) -> None:
        """Refuse a weight that may not be edited on behalf of its operators alone.

        Raises:
            Blocked: Another kind of reader or a differently sliced use shares it, or it must not be edited.
        """
        name = self.graph.values[key.parameter].name
        self._refuse_pinned(key.parameter)
        if key.parameter in self._state.labels:
            raise Blocked(f"{name} is used both as a weight and as data")
        foreign = self.operators.foreign.get(key.parameter, ())
        if foreign:
            node = self.graph.nodes[foreign[0]]
            raise Blocked(f"{name} is shared with {node.op} in {node.module or 'the model'}")
        for use in self.operators.by_parameter[key.parameter]:
            if use.key != key and key.overlaps(use.key):
                raise Blocked(f"{name} is read in two different ways")

    def require_member(self, use: Use) -> None:
        """Refuse to scale the input of an operator outside the site.

        Raises:
            Blocked: The operator belongs to another site.
        """
        if use.operator not in self._members:
            raise Blocked(f"{self.operators.records[use.operator].name} would read scaled data of another site")

    # -- solving -------------------------------------------------------------------------------------------------------

    def _push(self, node: int) -> None:
        if node not in self._state.waiting:
            self._state.waiting.add(node)
            self._state.queue.append(node)

    def solve(self, roots: Sequence[tuple[int, Tensor]]) -> Solution:
        """Propagate from the site's input until everything is consistent.

        Args:
            roots: Value and labels of the tensors that the site's operators read.

        Raises:
            Blocked: The scales cannot be folded.
        """
        for value, labels in roots:
            self.put(value, labels)
        self._settle()
        state = self._state
        leaves = {v: t for v, t in state.labels.items() if self.graph.values[v].kind == "parameter"}
        return Solution(
            ties=state.canon.long(),
            weights={k: self._canonical(t).reshape(k[0].batch, -1).long() for k, t in state.weights.items()},
            parameters={v: self._canonical(t).long() for v, t in leaves.items()},
            offsets={v: state.offsets[v] for v in leaves},
            values={v: self._canonical(t) for v, t in state.labels.items() if v not in leaves},
        )

    def _settle(self) -> None:
        while True:
            self._drain()
            choice = next(iter(self._state.choices), None)
            if choice is None:
                return
            del self._state.choices[choice]
            alternatives = self._apply(self.graph.nodes[choice])
            if alternatives is None:
                continue
            before, first = self._state.copy(), None
            for alternative in alternatives:
                self._state = before.copy()
                try:
                    node = self.graph.nodes[choice]
                    self.link(node.out, alternative.value, alternative.index)
                    self._settle()
                    return
                except Blocked as blocked:
                    first = first or blocked
                    self._guesses += 1
                    if self._guesses > _GUESSES:
                        raise
            raise first or Blocked(f"{self.context(self.graph.nodes[choice])} has no factor that can be scaled")

    def _drain(self) -> None:
        state = self._state
        while state.queue:
            node = self.graph.nodes[state.queue.popleft()]
            state.waiting.discard(node.index)
            if self._apply(node) is not None:
                state.choices[node.index] = None

    def _apply(self, node: Node) -> list[Alternative] | None:
        self._visits += 1
        if self._visits > _VISITS:
            raise Blocked("the tensor takes part in too many operations to follow")
        rule = self._rules.get(node.op)
        if rule is None:
            reads = any(self.labelled(v) for v in node.inputs)
            raise Blocked(f"{'read' if reads else 'made'} by {self.context(node)}")
        by_products = () if node.op in _SPLITTERS else node.outputs[1:]
        if any(self.labelled(v) for v in by_products):
            # statistics and the like, which rules know nothing about
            raise Blocked(f"made by {self.context(node)}")
        return rule(self, node)

    def run_on_index(self, node: Node, sources: Sequence[int]) -> list[Tensor]:
        """Where every output element of a data movement comes from.

        The operation itself is run on element numbers (plus one, so that a zero is padding).

        Args:
            node: A data movement.
            sources: Values moved; their elements are numbered one after the other.

        Returns:
            For each output, the number of the source element, or -1 for padding.

        Raises:
            Blocked: An index tensor is not known, or the operation takes no integers.
        """
        numbers: dict[int, Tensor] = {}
        start = 1
        for source in sources:
            value = self.graph.values[source]
            numbers[source] = torch.arange(start, start + value.numel).reshape(value.shape)
            start += value.numel

        def fill(argument: Any, dtype: torch.dtype) -> Any:
            if not isinstance(argument, Ref):
                return torch.device("cpu") if isinstance(argument, torch.device) else argument
            if argument.index in numbers:
                return numbers[argument.index].to(dtype)
            data = self.graph.values[argument.index].data
            if data is None:
                raise Blocked(f"{self.context(node)} depends on data that is not kept")
            return data.cpu()

        result: Any = None
        for dtype in (torch.int64, torch.float64):
            filled = partial(fill, dtype=dtype)
            args = substitute(node.args, filled)
            kwargs = {name: substitute(argument, filled) for name, argument in node.kwargs.items()}
            try:
                result = node.func(*args, **kwargs)
                break
            except (RuntimeError, TypeError) as error:
                # some kernels (padding, im2col) exist for floating numbers only, which are exact up to 2**53
                if dtype is torch.float64:
                    raise Blocked(f"{self.context(node)} cannot be followed") from error
        outputs = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
        return [t.round().long() - 1 if t.is_floating_point() else t.long() - 1 for t in outputs]

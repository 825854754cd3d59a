"""Memory of the graph that a backward pass needs, and ways to keep within it: checkpoints, and a single projection."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphasmith.objectives.media.batch import CALL_ERRORS, Batch, call, main_output
from alphasmith.objectives.sensitivity._checkpoints import Checkpoints, blocks
from alphasmith.objectives.sensitivity._gradients import Operators, frozen, hooked, watched
from alphasmith.objectives.text import counted, error_line, size_text

#: Gradients and what they are made of alive at a time: as multiples of an operator's output, and of the largest tensor kept for it.
_LIVE_OUTPUTS = 4
_LIVE_KEPT = 3


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """A way to carry gradients back.

    Attributes:
        need: Most memory alive at a time [bytes].
        projections: Of each sample's output.
        checkpointed: Blocks that are computed again; empty: graphs are kept whole.
        note: What was given up for memory; empty where nothing was.
    """

    need: int
    projections: int
    checkpointed: tuple[nn.Module, ...] = ()
    note: str = ""

    def checkpoints(self) -> Checkpoints:
        """The blocks, to be placed around forward and backward passes."""
        return Checkpoints(self.checkpointed)


@dataclass(frozen=True, kw_only=True)
class GraphPlans:
    """Ways to carry gradients back within memory, the best first; why there is none, or empty."""

    plans: tuple[GraphPlan, ...] = ()
    failure: str = ""


def graph_plans(
    model: nn.Module, operators: Operators, samples: Sequence[Batch], memory: int | None, projections: int = 1
) -> GraphPlans:
    """How gradients can be carried back, as far as a forward pass of the largest sample tells.

    Nothing of its graph is kept: only the bytes are counted that the graph, and errors of the operators' outputs, would take.
    Checkpoints come before fewer projections: they cost time, errors and forward passes of the blocks once more for each
    projection, and no accuracy. A graph that several projections go back through stays until the last; that of a single one is
    freed as it is read.

    Args:
        model: The float model, in evaluation mode.
        operators: Errors of their outputs are kept beside the graph.
        samples: What is run, one at a time.
        memory: Most bytes; None: no bound.
        projections: Wanted of each output.
    """
    count = _Count(model, operators)
    try:
        carries = count.run(max(samples, key=_numbers))
    except CALL_ERRORS as error:  # it ran without gradients before: whatever it raises now is about them
        return GraphPlans(failure=f"the model does not run with gradients ({error_line(error)})")
    if not carries:
        return GraphPlans(failure="the model's output carries no gradient")
    again = (
        f"{counted(len(count.blocks), 'block')} of the model are computed again for each one (gradient checkpointing)"
    )
    fewer = f"1 projection of every sample's output is taken in place of {projections}, so that shares are less exact"
    ways: list[tuple[int, tuple[nn.Module, ...], str]] = [(projections, (), "")]
    if count.blocks:
        ways.append((projections, count.blocks, again))
    if projections > 1:
        ways += [(1, parts, f"{note}, and {fewer}" if note else fewer) for _, parts, note in ways]
    needs = [(_need(count.pieces(checkpointed=bool(parts)), n), n, parts, note) for n, parts, note in ways]
    left = "" if memory is None else f", and {size_text(max(0, memory))} are left for it"
    short = f"a backward pass needs {size_text(needs[0][0])} of memory{left}"
    plans = [
        GraphPlan(need=need, projections=n, checkpointed=parts, note=f"{short}: {note}" if note else "")
        for need, n, parts, note in needs
        if memory is None or need <= memory
    ]
    if plans:
        return GraphPlans(plans=tuple(plans))
    least = min(need for need, *_ in needs)
    return GraphPlans(failure=f"{short}; in the way that takes least it needs {size_text(least)}")


def _numbers(batch: Batch) -> int:
    values = (*batch.args, *batch.kwargs.values())
    return sum(value.numel() for value in values if isinstance(value, Tensor))


@dataclass(frozen=True)
class _Piece:
    """A stretch of a forward pass [bytes].

    Attributes:
        kept: What the graph keeps of it.
        again: What is computed again for it in a backward pass, and freed.
        live: What a backward pass holds at a time beside that: gradients.
    """

    kept: int
    again: int
    live: int


def _need(pieces: Sequence[_Piece], projections: int) -> int:
    """Most bytes alive at a time in backward passes, which go through the pieces from the last to the first."""
    live = [0, *(piece.live for piece in pieces), 0]
    alive = [piece.again + max(live[i : i + 3]) for i, piece in enumerate(pieces)]  # gradients of neighbours meet
    kept = list(accumulate(piece.kept for piece in pieces))
    if projections > 1:
        kept = kept[-1:] * len(kept)
    return max((k + a for k, a in zip(kept, alive, strict=True)), default=0)


@dataclass(frozen=True)
class _Event:
    """Something that a forward pass met.

    Attributes:
        kind: An operator's output, the beginning or the end of a block, the model's output.
        kept: Bytes kept before it.
        size: Bytes of the output, or of a block's inputs that no block before it had.
        largest: Bytes of the largest tensor kept since the event before.
    """

    kind: Literal["operator", "enter", "leave", "end"]
    kept: int
    largest: int
    size: int = 0

    @property
    def live(self) -> int:
        """What a backward pass holds here at a time beside the graph."""
        return max(_LIVE_OUTPUTS * self.size if self.kind in ("operator", "end") else 0, _LIVE_KEPT * self.largest)


class _Count:
    """Bytes that a forward pass would keep, stretch by stretch.

    Args:
        model: The float model.
        operators: Errors of their outputs are counted too.
    """

    def __init__(self, model: nn.Module, operators: Operators) -> None:
        self._model = model
        self._operators = operators
        self._events: list[_Event] = []
        self.blocks = tuple(blocks(model))

    def run(self, sample: Batch) -> bool:
        """Run a sample; False where its output carries no gradient."""
        saved = _SavedBytes(self._model)
        inputs = _SavedBytes(self._model)

        def size_up(_: str, __: nn.Module, ___: Any, ____: Any, output: Tensor) -> Tensor:
            self._events.append(_Event("operator", saved.total, saved.take_largest(), _bytes(output)))
            return watched(output) if torch.is_grad_enabled() else output

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before = inputs.total
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(tensor, Tensor):
                        inputs.add(tensor)
            self._events.append(_Event("enter", saved.total, saved.take_largest(), inputs.total - before))

        def leave(*_: Any) -> None:
            self._events.append(_Event("leave", saved.total, saved.take_largest()))

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave).remove)
            stack.enter_context(frozen(self._model))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(hooked(self._model, self._operators, size_up))
            stack.enter_context(saved.counting())
            output = main_output(call(self._model, sample))
        self._events.append(_Event("end", saved.total, saved.take_largest(), _bytes(output)))
        return output.requires_grad

    def pieces(self, *, checkpointed: bool) -> list[_Piece]:
        """The forward pass in pieces, with its blocks kept or computed again."""
        found: list[_Piece] = []
        before = 0
        inside: list[_Event] = []  # events of the block that is being passed, from its beginning
        for event in self._events:
            if checkpointed and (inside or event.kind == "enter"):
                inside.append(event)
                if event.kind == "leave":
                    start, rest = inside[0], inside[1:]
                    again = event.kept - start.kept + sum(e.size for e in rest)
                    found.append(_Piece(start.kept - before, 0, start.live))
                    found.append(_Piece(start.size, again, max(e.live for e in rest)))
                    before, inside = event.kept, []
            else:
                error = event.size if event.kind == "operator" else 0
                found.append(_Piece(event.kept - before + error, 0, event.live))
                before = event.kept
        return found


def _bytes(output: Tensor) -> int:
    return output.numel() * max(4, output.element_size())


class _SavedBytes:
    """Counts what a forward pass would keep for its backward pass, and keeps none of it.

    Args:
        model: Its parameters and buffers count nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        held = (*model.parameters(), *model.buffers())
        self._known = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._seen: dict[int, weakref.ref[Any]] = {}
        self.total = 0
        self._largest = 0

    def take_largest(self) -> int:
        """Bytes of the largest storage counted since the last call."""
        largest, self._largest = self._largest, 0
        return largest

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside; no backward pass can follow."""
        with torch.autograd.graph.saved_tensors_hooks(self.add, _lost):
            yield

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._known:
            return
        before = self._seen.get(id(storage))
        if before is None or before() is not storage:  # a freed one may have had the same id
            self._seen[id(storage)] = weakref.ref(storage)
            self.total += storage.nbytes()
            self._largest = max(self._largest, storage.nbytes())


def _lost(_: Any) -> Tensor:
    raise RuntimeError("nothing was kept for a backward pass")

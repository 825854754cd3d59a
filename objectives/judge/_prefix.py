"""Outputs of a model's modules under one candidate, returned in the place of computing them again for other candidates.

Candidates of a coordinate search differ from the incumbent at one site or a few. Up to the first of them every module
receives what it received under the incumbent and makes of it what it made. A module's output is therefore kept with its
input, and returned where three things hold: nothing that the module reads has changed, its input is the same to the bit, and
it is a function of both. Blocks, their parts and single operators are kept in this order until the budget is spent; the order
of execution, branches, shared modules and routing need not be known.

Of a model that draws random numbers nothing is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from alphasmith.objectives.judge._module_calls import (
    CallKey,
    ModelCalls,
    all_same,
    copied,
    flat,
    intercepted,
    same,
    storage_of,
    traced,
)
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.smoothing import Smoothing

_Forward: TypeAlias = Callable[[], Tensor]


class PrefixCache:
    """Module outputs of one candidate on every batch, within a budget.

    Args:
        sizes: Samples of every batch.
        budget: Most bytes kept; 0 keeps nothing.
    """

    def __init__(self, sizes: Sequence[int], budget: int) -> None:
        self._sizes = tuple(sizes)
        self._budget = budget
        self._structure: ModelCalls | None = None
        self._kept: dict[int, _BatchRecords] = {}
        self._affected: _Affected | None = None
        self._usable = budget > 0
        self._proven = False
        self._schemes: SiteSchemes | None = None

    @property
    def nbytes(self) -> int:
        """What is kept [bytes]."""
        return sum(records.nbytes for records in self._kept.values())

    def forget(self) -> None:
        """Keep nothing any more."""
        self._kept, self._affected, self._proven = {}, None, False

    def learn(self, index: int, candidate: CandidateModel, forward: _Forward) -> Tensor:
        """The output of ``forward``; what the modules of the candidate applied last make of the batch is kept.

        Args:
            index: The batch.
            candidate: Its model is what ``forward`` runs.
            forward: Runs it on the batch and returns its output.
        """
        base = candidate.smoothings
        if not self._usable or base is None:
            return forward()
        self._follow(candidate)
        if self._structure is None:
            # While a batch is learned anew, its old records are still there.
            most = sum(self._sizes) + max(self._sizes)
            self._structure = traced(candidate, forward, self._budget * self._sizes[index] // most)
        old, structure = self._kept.get(index, _BatchRecords(base, {})), self._structure
        affected = self._affected_names(candidate, old.base)
        lesson = _Pass(old.records, affected, wanted=structure.wanted, room=self._budget - self.nbytes)
        with intercepted(candidate.model, structure.names, lesson):
            output = forward()
        if not lesson.unharmed():
            self._kept.pop(index, None)
            return forward()
        self._kept[index] = _BatchRecords(base, lesson.learned())
        self._proven = False
        return output

    def run(self, index: int, candidate: CandidateModel, forward: _Forward) -> Tensor:
        """The output of ``forward``; what is known of the batch is not computed again.

        Args:
            index: The batch.
            candidate: Its model is what ``forward`` runs.
            forward: Runs it on the batch and returns its output.
        """
        self._follow(candidate)
        kept, structure = self._kept.get(index), self._structure
        if kept is None or structure is None or candidate.smoothings is None:
            return forward()
        replay = _Pass(kept.records, self._affected_names(candidate, kept.base))
        with intercepted(candidate.model, structure.names, replay):
            output = forward()
        if not replay.unharmed():
            del self._kept[index]
            return forward()
        if not replay.used or self._proven:
            return output
        # What no trace sees, such as state outside the model, shows where both ways are compared.
        computed = forward()
        self._proven = same(output, computed)
        if not self._proven:
            self._usable = False
            self.forget()
        return computed

    def _follow(self, candidate: CandidateModel) -> None:
        """Keep nothing of a model that computed in other schemes."""
        if self._schemes != candidate.schemes:
            self.forget()
            self._schemes, self._structure = candidate.schemes, None

    def _affected_names(self, candidate: CandidateModel, base: Mapping[str, Smoothing]) -> frozenset[str]:
        """Names of the modules that read something which differs from what it was under ``base``."""
        known, applied = self._affected, candidate.smoothings
        if known is None or known.base is not base or known.applied is not applied:
            structure = self._structure or ModelCalls()
            known = _Affected(base, applied, structure.affected(candidate.model, candidate.differing(base)))
            self._affected = known
        return known.names


@dataclass(frozen=True, eq=False)
class _Affected:
    """What was found out last, and for which two candidates."""

    base: Mapping[str, Smoothing]
    applied: Mapping[str, Smoothing] | None
    names: frozenset[str]


@dataclass(frozen=True, eq=False)
class _Record:
    """One call of a module: its input, its output, and the calls inside it, by name and in order.

    ``held`` are the tensors of both with the version each had: one that was written to since is worth nothing.
    """

    inputs: tuple[Any, ...]
    output: Any
    inside: tuple[str, ...]
    held: tuple[tuple[Tensor, int], ...]

    @property
    def sound(self) -> bool:
        """Whether nobody wrote to a tensor of it."""
        return all(tensor._version == version for tensor, version in self.held)


@dataclass(frozen=True, eq=False)
class _BatchRecords:
    """All records of one batch, under the smoothings ``base``."""

    base: Mapping[str, Smoothing]
    records: Mapping[CallKey, _Record]

    @property
    def nbytes(self) -> int:
        """Their memory, shared parts once [bytes]."""
        held = (tensor for record in self.records.values() for tensor, _ in record.held)
        return sum(dict(storage_of(tensor) for tensor in held).values())


class _Pass:
    """One forward in which known outputs are returned and, where some are ``wanted``, new ones kept.

    Args:
        known: Records of the batch.
        affected: Modules they no longer hold for.
        wanted: Calls to keep.
        room: Bytes that new records may take.
    """

    def __init__(
        self,
        known: Mapping[CallKey, _Record],
        affected: frozenset[str],
        *,
        wanted: frozenset[CallKey] = frozenset(),
        room: int = 0,
    ) -> None:
        self._known, self._affected, self._wanted, self._room = known, affected, wanted, room
        held = (tensor for record in known.values() for tensor, _ in record.held) if wanted else ()
        self._counted = {storage_of(tensor)[0] for tensor in held}
        self._calls: Counter[str] = Counter()
        self._log: list[str] = []
        self._new: dict[CallKey, _Record] = {}
        self.used: list[_Record] = []

    def call(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See :class:`Listener`."""
        key = self._begun(name)
        known = None if name in self._affected else self._known.get(key)
        keep = key in self._wanted
        inputs = flat((args, kwargs)) if known is not None or keep else None
        if known is not None and inputs is not None and known.sound and all_same(known.inputs, inputs):
            self.used.append(known)
            self._carry(key, known)
            for inner in known.inside:
                again = self._begun(inner)
                if again in self._known:
                    self._carry(again, self._known[again])
            return copied(known.output)
        first = len(self._log)
        held = [] if inputs is None else [(t, t._version) for t in inputs if isinstance(t, Tensor)]
        output = forward(*args, **kwargs)
        if keep and inputs is not None and all(tensor._version == version for tensor, version in held):
            self._keep(key, inputs, output, tuple(self._log[first:]), held)
        return output

    def unharmed(self) -> bool:
        """Whether nobody wrote to a tensor that was returned in the place of a new one."""
        return all(record.sound for record in self.used)

    def learned(self) -> dict[CallKey, _Record]:
        """The records of this forward, without those of tensors that were written to later."""
        return {key: record for key, record in self._new.items() if record.sound}

    def _begun(self, name: str) -> CallKey:
        key = (name, self._calls[name])
        self._calls[name] += 1
        self._log.append(name)
        return key

    def _carry(self, key: CallKey, record: _Record) -> None:
        if key in self._wanted:
            self._new[key] = record

    def _keep(
        self,
        key: CallKey,
        inputs: tuple[Any, ...],
        output: Any,
        inside: tuple[str, ...],
        held: list[tuple[Tensor, int]],
    ) -> None:
        made = flat(output, records=True)
        if made is None:
            return
        held = held + [(t, t._version) for t in made if isinstance(t, Tensor)]
        sizes = {place: size for place, size in (storage_of(t) for t, _ in held) if place not in self._counted}
        if sum(sizes.values()) > self._room:
            return
        self._room -= sum(sizes.values())
        self._counted.update(sizes)
        # The container is the model's own; it may put something else into it later.
        self._new[key] = _Record(inputs, copied(output), inside, tuple(held))

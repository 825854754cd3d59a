"""One model that becomes candidate after candidate, in place, and the float model again. Source: claim A-2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.modules import operator_module
from alphasmith.objectives.quantization.operator import Execution, QuantizedOperator
from alphasmith.objectives.quantization.payload import payload
from alphasmith.objectives.quantization.plan import Plan, QuantizationSummary, Target, named_tensors, same_smoothing
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.quantization.stack import QuantizedStack, put
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing

_DIGEST_PART = 1 << 20


class CandidateModel:
    """A model that becomes candidate after candidate, in place, without a copy of its weights. Source: claim A-2.

    Every candidate is built from the model's own tensors, which are read and never written: modules of quantized operators
    are exchanged for :class:`QuantizedOperator`, other tensors that smoothing edits for edited ones. :meth:`reset` puts
    the very modules and tensors back, so the float model returns bit for bit; :meth:`check_pristine` proves it. Memory
    beyond the model: the quantized weights of one candidate (and, with ``keep_dense`` and outside the integer path, the
    same weights dequantized) plus one parameter at a time in float64 while it is rebuilt.

    Args:
        model: The float model, private: put into evaluation mode, and not itself an operator.
        sites: Its sites.
        ranges: See :func:`quantize_model`.
        scheme: Number formats and granularity, of all sites or site by site.
        skip: ``fnmatch`` patterns of operator names to leave in float.
        execution: See :class:`QuantizedOperator`.
        keep_dense: Keep dequantized weights between calls of one candidate, where they are used: faster with few rows,
            and as large as the float weights.

    Raises:
        InputError: See :func:`quantize_model`.
        NonFiniteError: A calibrated range is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        ranges: Mapping[str, ChannelRange],
        scheme: Scheme | SiteSchemes,
        skip: Sequence[str] = (),
        *,
        execution: Execution = "integer",
        keep_dense: bool = True,
    ) -> None:
        self._plan = Plan(model, sites, skip, scheme)
        self._ranges = self._plan.checked_ranges(ranges)
        self.ranges: Mapping[str, ChannelRange] = dict(ranges)
        self._model = model.eval()
        self._source = named_tensors(model)
        self._digests = {name: bits_digest(tensor) for name, tensor in self._source.items()}
        self._execution = execution
        self._keep_dense = keep_dense
        self.sites = tuple(sites)
        self._exchanged: list[_Exchange] = []
        self._operators: dict[str, QuantizedOperator] = {}
        self._stacks: dict[str, QuantizedStack] = {}
        self._stacks_back: list[Callable[[], None]] = []
        self._stand_ins: dict[int, Tensor] = {}
        self._applied: dict[str, Smoothing] | None = None
        self._favourite: dict[str, Smoothing] = {}
        self._favourite_weights: dict[str, tuple[Tensor | None, ...]] = {}
        self._favourite_limit = 0
        self.reset()

    @property
    def model(self) -> nn.Module:
        """The model given: the last candidate applied, or the float model after :meth:`reset`."""
        return self._model

    @property
    def schemes(self) -> SiteSchemes:
        """The scheme of every site."""
        return self._plan.schemes

    def use(self, schemes: Scheme | SiteSchemes) -> None:
        """Become candidates under other schemes from now on; the model is the float model until one is applied.

        Args:
            schemes: Of all sites or site by site.

        Raises:
            InputError: A site that is named does not exist, or a static scheme has no calibrated range; nothing has changed then.
            NonFiniteError: A calibrated range is NaN or infinite.
        """
        if SiteSchemes.given(schemes) == self.schemes:
            return
        self.reset()
        plan = Plan(self._model, self.sites, self._plan.skip, schemes)
        ranges = plan.checked_ranges(self.ranges)
        self._plan, self._ranges = plan, ranges
        self.reset()

    @contextmanager
    def using(self, schemes: Scheme | SiteSchemes) -> Iterator[None]:
        """Candidates under other schemes inside a ``with`` block, under those of before and the float model after it, whatever happens inside.

        Args:
            schemes: Of all sites or site by site.

        Raises:
            InputError: As :meth:`use`.
            NonFiniteError: Likewise.
        """
        before = self.schemes
        self.use(schemes)
        try:
            yield
        finally:
            self.reset()
            self.use(before)

    @property
    def smoothings(self) -> Mapping[str, Smoothing] | None:
        """What the last candidate applied does to every site that it changes, never changed later; None after :meth:`reset`."""
        return self._applied

    @property
    def operators(self) -> tuple[nn.Module, ...]:
        """The quantized operators of the candidate applied last."""
        return tuple(self._operators.values())

    def differing(self, smoothings: Mapping[str, Smoothing]) -> list[nn.Module]:
        """Modules of the candidate applied last that hold other tensors than they would under other smoothings.

        Args:
            smoothings: As :attr:`smoothings` gave them for another candidate.
        """
        changed = self._changed(self._applied or {}, smoothings)
        targets = [t for t in self._plan.targets if not changed.isdisjoint(self._plan.dependencies(t))]
        stacks = [t for t in self._plan.stacks if not changed.isdisjoint(self._plan.dependencies(t))]
        tensors = {
            id(self._stand_ins[id(self._source[name])])
            for name in self._plan.others
            if not changed.isdisjoint(self._plan.editors(name))
        }
        holders = [
            module
            for module in self._model.modules()
            if any(id(t) in tensors for t in (*module._parameters.values(), *module._buffers.values()))
        ]
        operators = [self._operators[target.operator.name] for target in targets]
        return [*operators, *(self._stacks[target.operator.name] for target in stacks), *holders]

    def favour(self, smoothings: Mapping[str, Smoothing], limit: int) -> None:
        """Expect one candidate again and again: its quantized weights are kept while others are applied, and taken back.

        Args:
            smoothings: As for :meth:`apply`.
            limit: Most bytes that are kept beside the candidate applied last; 0 keeps none.

        Raises:
            InputError: As :meth:`apply`.
        """
        self._favourite = self._plan.checked_smoothings(smoothings)
        self._favourite_weights = {}
        self._favourite_limit = limit

    @property
    def favoured_bytes(self) -> int:
        """Quantized weights kept beside those of the candidate applied last [bytes]."""
        return _bytes(self._favourite_weights.values())

    def reset(self) -> nn.Module:
        """Make the model the float model again, with its own modules and tensors, and return it."""
        for back in reversed(self._stacks_back):
            back()
        for exchange in reversed(self._exchanged):
            exchange.registry[exchange.name] = exchange.original
        self._exchanged, self._operators, self._applied = [], {}, None
        self._stacks, self._stacks_back = {}, []
        self._favourite_weights = {}
        # By identity of the original, so that tied tensors stay tied.
        self._stand_ins = {}
        for name in self._plan.others:
            _stand_in(self._source[name], self._stand_ins)
        return self._model

    def apply(self, smoothings: Mapping[str, Smoothing]) -> None:
        """Turn the model into the candidate with these smoothings, from pristine weights.

        Only tensors that depend on a site whose smoothing differs from the last candidate's are rebuilt. After an error
        the model is the float model again.

        Args:
            smoothings: Site name -> smoothing; missing sites keep s = 1 and no shift.

        Raises:
            InputError: An unknown site, a wrong shape, a scale that is not positive, or values that differ within a tie.
            NonFiniteError: A scale or a folded weight is NaN or infinite.
        """
        checked = self._plan.checked_smoothings(smoothings)
        previous = self._applied
        changed = set(self._plan.sites) if previous is None else self._changed(previous, checked)
        if not changed and previous is not None:
            return
        complete = False
        try:
            for target in self._plan.targets:
                if not changed.isdisjoint(self._plan.dependencies(target)):
                    self._rebuild(target, checked)
            if previous is None:
                for module in self._model.modules():
                    self._exchange(module._parameters, self._stand_ins)
                    self._exchange(module._buffers, self._stand_ins)
            for target in self._plan.stacks:
                if not changed.isdisjoint(self._plan.dependencies(target)):
                    self._restack(target, checked)
            for name in self._plan.others:
                if not changed.isdisjoint(self._plan.editors(name)):
                    stand_in = self._stand_ins[id(self._source[name])]
                    # Cast first: biases of quantized operators are float32 inside a half-precision model.
                    stand_in.data = self._plan.edited(name, self._source, checked, stand_in.dtype)
            self._applied = checked
            complete = True
        finally:
            if not complete:
                self.reset()

    @contextmanager
    def applied(self, smoothings: Mapping[str, Smoothing]) -> Iterator[nn.Module]:
        """The candidate inside a ``with`` block, the float model after it, whatever happens inside.

        Args:
            smoothings: As for :meth:`apply`.

        Raises:
            InputError: As :meth:`apply`.
            NonFiniteError: As :meth:`apply`.
        """
        with self.restored():
            self.apply(smoothings)
            yield self._model

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The float model after a ``with`` block that applies any number of candidates, whatever happens inside."""
        try:
            yield
        finally:
            self.reset()

    def check_pristine(self) -> None:
        """Require that the float model's own tensors still hold the bits they had at the start, each with its digest.

        Raises:
            InputError: A tensor was written to meanwhile, named.
        """
        for name, tensor in self._source.items():
            if bits_digest(tensor) != self._digests[name]:
                raise InputError(
                    "model", f"{name} changed while candidates were scored", "leave weights alone in metrics and hooks"
                )

    def summary(self) -> QuantizationSummary:
        """Sizes of the candidate applied last.

        Raises:
            InputError: No candidate was applied since the last reset.
        """
        if self._applied is None:
            raise InputError("candidate", "no scales are applied", "call apply(smoothings) first")
        return self._plan.summary(self._model, {**self._operators, **self._stacks}, self._applied)

    def payload(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the candidate applied last is stored as, see ``quantization.payload``; it stays valid when folding follows.

        Tensors that no site edits share their memory with the float model; those that folding writes to are copies.

        Raises:
            InputError: Two tensors of the model would get one name.
        """
        tensors, structure = payload(self._model)
        edited = {edit.parameter for site in self.sites for edit in site.edits}
        edited |= {shifted.parameter for site in self.sites for shifted in site.shift_edits}
        written = {self._source[name].untyped_storage().data_ptr() for name in edited}
        kept = {n: t.clone() if t.untyped_storage().data_ptr() in written else t for n, t in tensors.items()}
        return kept, structure

    def alone(self, smoothings: Mapping[str, Smoothing], *, dense: bool = True) -> dict[str, dict[str, nn.Module]]:
        """Quantized operators that each serve the float model in the place of their own float one.

        Every site is made explicit: its operators divide their own input, and nothing is taken from or left to others. So each
        makes the error of its site and of no other. The model itself stays, or becomes again, the float model.

        Args:
            smoothings: As for :meth:`apply`.
            dense: Whether they keep their dequantized weights where candidates do.

        Returns:
            Site -> operator -> its quantized form (a ``QuantizedOperator``), in forward order; sites without one, and stacked weights, are left out.

        Raises:
            InputError: As :meth:`apply`.
            NonFiniteError: As :meth:`apply`.
        """
        self.reset()
        checked = self._plan.checked_smoothings(smoothings)
        plan = Plan(self._model, [_explicit(site) for site in self.sites], self._plan.skip, self.schemes)
        made: dict[str, dict[str, nn.Module]] = {}
        for target in plan.targets:
            name, operator = target.site.name, target.operator
            # Only its own smoothing: a tied weight may be edited by other sites as well.
            own = {name: checked[name]} if name in checked else {}
            twin = _twin(operator_module(self._model, operator.name), {})
            for module in twin.modules():
                _own_hooks(module)
            made.setdefault(name, {})[operator.name] = QuantizedOperator.quantize(
                twin,
                plan.rebuilt(target, self._source, own, self._ranges),
                scheme=target.scheme,
                kind=operator.kind,
                transposed=operator.transposed,
                execution=self._execution,
                keep_dense=self._keep_dense and dense,
            )
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as it is now, without gradients."""
        with torch.no_grad():
            return self._model(*args, **kwargs)

    def _changed(self, left: Mapping[str, Smoothing], right: Mapping[str, Smoothing]) -> set[str]:
        """Names of the sites on which two candidates differ."""
        names = (site.name for site in self.sites)
        return {name for name in names if not same_smoothing(left.get(name), right.get(name))}

    def _swapped(
        self, target: Target, holder: QuantizedOperator | QuantizedStack, wanted: Mapping[str, Smoothing]
    ) -> bool:
        """Keep what an operator holds if it is the favourite's; give it the favourite's back if that is what is wanted and kept."""
        name, sites = target.operator.name, self._plan.dependencies(target)

        def favoured(smoothings: Mapping[str, Smoothing]) -> bool:
            return all(same_smoothing(smoothings.get(site), self._favourite.get(site)) for site in sites)

        if favoured(wanted):
            kept = self._favourite_weights.pop(name, None)
            if kept is not None:
                holder.take(kept)
            return kept is not None
        if self._favourite_limit and self._applied is not None and favoured(self._applied):
            held = holder.held()
            if self.favoured_bytes + _bytes([held]) <= self._favourite_limit:
                self._favourite_weights[name] = held
        return False

    def _rebuild(self, target: Target, smoothings: Mapping[str, Smoothing]) -> None:
        operator = self._operators.get(target.operator.name)
        if operator is not None and self._swapped(target, operator, smoothings):
            return
        rebuilt = self._plan.rebuilt(target, self._source, smoothings, self._ranges)
        if operator is not None:
            operator.requantize(rebuilt)
            return
        inner = operator_module(self._model, target.operator.name)
        operator = QuantizedOperator.quantize(
            _twin(inner, self._stand_ins),
            rebuilt,
            scheme=target.scheme,
            kind=target.operator.kind,
            transposed=target.operator.transposed,
            execution=self._execution,
            keep_dense=self._keep_dense,
        )
        self._operators[target.operator.name] = operator
        for module in list(self._model.modules()):  # one module may stand under several names
            self._exchange(module._modules, {id(inner): operator})

    def _restack(self, target: Target, smoothings: Mapping[str, Smoothing]) -> None:
        stack = self._stacks.get(target.operator.name)
        if stack is not None and self._swapped(target, stack, smoothings):
            return
        weight = self._plan.smoothed(target, self._source, smoothings)
        if stack is not None:
            stack.requantize(weight)
            return
        stack = QuantizedStack.quantize(weight, scheme=target.scheme, transposed=target.operator.transposed)
        self._stacks[target.operator.name] = stack
        self._stacks_back.append(put(self._model, target.operator.weight, stack))

    def _exchange(self, registry: dict[str, Any], replacements: Mapping[int, nn.Module | Tensor]) -> None:
        """Put other modules or tensors into a registry of a module, by the identity of those they replace."""
        for name, held in registry.items():
            if held is not None and id(held) in replacements:
                self._exchanged.append(_Exchange(registry, name, held))
                registry[name] = replacements[id(held)]


def _bytes(states: Iterable[Sequence[Tensor | None]]) -> int:
    return sum(tensor.nbytes for state in states for tensor in state if tensor is not None)


@dataclass(frozen=True, eq=False)
class _Exchange:
    """One entry of a module's registry, and what it held before."""

    registry: dict[str, Any]
    name: str
    original: nn.Module | Tensor


def _explicit(site: Site) -> Site:
    """The same site with nothing folded: only its own operators know of its smoothing."""
    if site.mode == "left":
        return site
    edits = tuple(edit for edit in site.edits if edit.power > 0)
    return replace(site, mode="explicit", edits=edits, producers=(), shift_edits=())


def _own_hooks(module: nn.Module) -> None:
    """Hooks that a module has now stay its own: those registered later on the module it was made from do not reach it."""
    for name, held in module.__dict__.items():
        if "_hooks" in name and isinstance(held, dict):
            module.__dict__[name] = held.copy()


def _twin(module: nn.Module, stand_ins: dict[int, Tensor]) -> nn.Module:
    """A module with the settings, hooks and memory of another, and its own registries: changing it leaves the other."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers"):
        tensors = module.__dict__[registry]
        twin.__dict__[registry] = {n: None if t is None else _stand_in(t, stand_ins) for n, t in tensors.items()}
    children = module.__dict__["_modules"]
    twin.__dict__["_modules"] = {n: None if c is None else _twin(c, stand_ins) for n, c in children.items()}
    return twin


def _stand_in(tensor: Tensor, stand_ins: dict[int, Tensor]) -> Tensor:
    """The one tensor that stands for another in candidates; it shares its memory until its data are replaced."""
    if id(tensor) not in stand_ins:
        alias = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        stand_ins[id(tensor)] = nn.Parameter(alias, requires_grad=tensor.requires_grad) if is_parameter else alias
    return stand_ins[id(tensor)]


def bits_digest(tensor: Tensor) -> tuple[int, int]:
    """Sum of the bits, read as integers, and of every second of them: cheap, and changed by any ordinary write."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return 0, 0
    flat = tensor.detach().reshape(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
    # Part by part: a sum in another dtype may convert its operand first.
    parts = bits.split(_DIGEST_PART)
    whole = sum(int(part.sum(dtype=torch.int64)) for part in parts)
    return whole, sum(int(part[::2].sum(dtype=torch.int64)) for part in parts)

"""A model in a Hugging Face folder of which one part at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from alphasmith.objectives.blocks._chain import BlockCall, StandIn, chain_of, find_blocks, form_of, watched
from alphasmith.objectives.blocks._others import LEAF
from alphasmith.objectives.blocks.parts import BlockPart, StatesIn, StatesOut, block_batch
from alphasmith.objectives.blocks.stored_weights import StoredWeights
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.finite import all_finite
from alphasmith.objectives.media.batch import Batch, call, data_errors
from alphasmith.objectives.model.hf_folder import weight_files
from alphasmith.objectives.model.loading import LoadedModel, load_empty, processors_in, tensors_digest
from alphasmith.objectives.model.plain_operators import needs_rewriting
from alphasmith.objectives.stored_types import checkpoint_types
from alphasmith.objectives.text import listed

_REMEDY = "use 'resident'"


@dataclass(frozen=True)
class Start:
    """What goes into the first block, and what all blocks are called with beside the hidden state.

    Attributes:
        hidden: The hidden state (samples, ...).
        leaves: The other tensors by name of the slot.
    """

    hidden: Tensor
    leaves: dict[str, Tensor]


class StreamedModel:
    """A model whose repeated blocks are put into memory one at a time, and the rest without them.

    Made, it holds no weight. Blocks and rest are those of the model's own architecture, with its names, so that each is a small
    model for whatever works on models.

    Attributes:
        folder: Where it is.
        path: Name of the list of blocks, e.g. ``model.layers``.
        blocks: How many blocks there are.
        skeleton: The model without blocks; parameters on the device ``meta`` while it is not in memory.
        weights: The tensors of the folder.

    Args:
        folder: Hugging Face folder.

    Raises:
        InputError: Field ``memory.mode``: the model has no repeated blocks, or its checkpoint names tensors otherwise. Or the
            folder cannot be read, as :func:`objectives.model.loading.load_model`.
    """

    def __init__(self, folder: Path) -> None:
        model = load_empty(folder)
        path = find_blocks(model)
        if path is None:
            raise InputError("memory.mode", "the model has no list of blocks of one class", _REMEDY)
        if needs_rewriting(model):
            raise InputError("memory.mode", "parts of the model are rewritten as plain operators", _REMEDY)
        self.folder = folder
        self.path = path
        self.weights = StoredWeights(weight_files(folder))
        self.parameter_count = sum(p.numel() for p in model.parameters())
        self._types = checkpoint_types(weight_files(folder), model)
        self._state = dict(model.state_dict())
        self._names = _names(model)
        self._check_names()
        self.skeleton = model
        self._blocks = list(model.get_submodule(path).children())
        self.blocks = len(self._blocks)
        self._stand_ins = [StandIn(block) for block in self._blocks]
        self.without_blocks()
        last = f"{path}.{self.blocks - 1}"
        model.register_forward_pre_hook(StatesIn(last), with_kwargs=True)
        model.register_forward_hook(StatesOut(last))
        self._calls: list[BlockCall] | None = None
        model.eval()

    def loaded(self) -> LoadedModel:
        """What :func:`objectives.model.loading.load_model` tells of the folder; its model is the skeleton. Reads every tensor once.

        Raises:
            InputError: A parameter holds NaN or infinity.
        """

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in sorted(self._state):
                value = self.weights.read(name) if name in self.weights else self._state[name]
                if value.is_meta:
                    value = self.weights.read(self._source(name))
                if value.is_floating_point() and not all_finite(value):
                    remedy = "give a checkpoint with finite weights"
                    raise InputError("model.path", f"NaN or infinity in {name}", remedy)
                yield name, value

        return LoadedModel(
            model=self.skeleton,
            kind="hf",
            folder=self.folder,
            config=getattr(self.skeleton, "config", None),
            processors=processors_in(self.folder),
            digest=tensors_digest(tensors()),
            parameter_count=self.parameter_count,
            types=self._types,
        )

    @property
    def block_class(self) -> str:
        """Name of the class of the blocks."""
        return type(self._blocks[0]).__name__

    def block_name(self, number: int) -> str:
        """Name of a block in the model, e.g. ``model.layers.3``."""
        return f"{self.path}.{number}"

    def block_bytes(self) -> int:
        """The weights of the largest block as float32 [bytes]."""
        return max(4 * sum(p.numel() for p in block.parameters()) for block in self._blocks)

    def around_bytes(self) -> int:
        """The weights of what is around the blocks as float32 [bytes]."""
        return 4 * sum(p.numel() for p in self.skeleton.parameters())

    def check(self, batch: Batch, device: torch.device) -> None:
        """See that the blocks are a chain, and learn how the model calls them. The first block is in memory for a moment.

        Args:
            batch: One or two samples, on the device.
            device: Where to run.

        Raises:
            InputError: Field ``memory.mode``: they are no chain. Field ``data``: the model cannot be called with the batch.
        """
        with self.around(device) as model, torch.no_grad():
            first = self._stand_ins[0]
            with watched([first]), data_errors():
                try:
                    call(model, batch)
                except (AttributeError, IndexError, TypeError, ValueError):
                    if not first.seen:
                        raise  # else what follows did not understand what a stand-in returns
                if not first.seen:
                    raise InputError("memory.mode", "block 0 is not called in a forward", _REMEDY)
                args, kwargs = first.seen[0]
            hidden = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(hidden, Tensor):
                raise InputError("memory.mode", "block 0 is called with no hidden state first", _REMEDY)
            with self._in_memory(self._blocks[0], self.block_name(0), device), data_errors():
                form = form_of(self._blocks[0](*args, **kwargs), hidden)
            for one in self._stand_ins:
                one.form = form
            self._calls = self._observe(model, batch)[1]

    def start(self, model: nn.Module, batch: Batch) -> Start:
        """What the model makes of a batch before its first block.

        Args:
            model: What :meth:`around` gave.
            batch: On its device.

        Raises:
            InputError: Field ``memory.mode``: the blocks are called otherwise than with the batch of :meth:`check`.
        """
        with torch.no_grad():
            found, calls = self._observe(model, batch)
        known = self._known()
        if [(c.named, c.args, c.kwargs) for c in calls] != [(c.named, c.args, c.kwargs) for c in known]:
            raise InputError("memory.mode", "its blocks are called in several ways", _REMEDY)
        return found

    def batch(self, number: int, batch: Batch, start: Start) -> Batch:
        """What a block is called with.

        Args:
            number: The block.
            batch: What the model is called with.
            start: Its ``leaves`` are those of :meth:`start`, its ``hidden`` the state before this block.
        """
        return block_batch(batch, start.hidden, start.leaves, self._known()[number])

    @contextmanager
    def block(self, number: int, device: torch.device) -> Iterator[nn.Module]:
        """A block as a model, in memory inside a ``with`` block; what is done to its weights is forgotten afterwards.

        Args:
            number: From 0.
            device: Where its weights are put.
        """
        block = self._blocks[number]
        part = BlockPart(self.block_name(number), block, self._known()[number])
        with self._in_memory(block, self.block_name(number), device):
            yield part

    @contextmanager
    def around(self, device: torch.device) -> Iterator[nn.Module]:
        """The model without its blocks, in memory inside a ``with`` block; called with what its last block returned among its arguments.

        Args:
            device: Where its weights are put.
        """
        with self._in_memory(self.skeleton, "", device):
            yield self.skeleton

    def whole(self) -> nn.Module:
        """The model with its blocks in their places, all parameters on the device ``meta``; :meth:`without_blocks` takes them out again."""
        self._put(self._blocks)
        return self.skeleton

    def without_blocks(self) -> None:
        """Put stand-ins in the place of the blocks."""
        self._put(self._stand_ins)

    def _put(self, modules: Sequence[nn.Module]) -> None:
        place = self.skeleton.get_submodule(self.path)
        for number, module in enumerate(modules):
            place.add_module(str(number), module)

    def stored_names(self, part: nn.Module) -> list[str]:
        """Names under which the folder stores the tensors of a part.

        Args:
            part: Of :meth:`block` or :meth:`around`.
        """
        return [name for name in part.state_dict() if name in self.weights]

    def _observe(self, model: nn.Module, batch: Batch) -> tuple[Start, list[BlockCall]]:
        with watched(self._stand_ins), data_errors():
            call(model, batch)
            hidden, leaves, calls = chain_of(self._stand_ins, batch.size)
        named = {LEAF.format(index): leaf for index, leaf in enumerate(leaves)}
        # What is kept is how a block is called, not with what.
        empty = [BlockCall(hidden.new_empty(0), c.named, c.args, c.kwargs) for c in calls]
        return Start(hidden=hidden, leaves=named), empty

    def _known(self) -> Sequence[BlockCall]:
        if self._calls is None:
            raise InputError("memory.mode", "the blocks were not looked at", "call check first")
        return self._calls

    @contextmanager
    def _in_memory(self, module: nn.Module, path: str, device: torch.device) -> Iterator[None]:
        """Parameters and stored buffers of a module read from the folder inside, those of before put back afterwards."""
        made: dict[int, nn.Parameter] = {}
        back: list[Callable[[], None]] = []
        try:
            for name, owner in module.named_modules(remove_duplicate=False):
                for leaf, parameter in list(owner._parameters.items()):
                    if parameter is None:
                        continue
                    if id(parameter) not in made:
                        full = self._source(_joined(path, name, leaf))
                        value = self.weights.read(full).to(device)
                        made[id(parameter)] = nn.Parameter(value, requires_grad=False)
                    back.append(_restoring(owner._parameters, leaf, parameter))
                    owner._parameters[leaf] = made[id(parameter)]
                for leaf, buffer in list(owner._buffers.items()):
                    if buffer is None:
                        continue
                    full = _joined(path, name, leaf)
                    back.append(_restoring(owner._buffers, leaf, buffer))
                    value = self.weights.read(full) if full in self.weights else buffer.clone()
                    owner._buffers[leaf] = value.to(device)
            yield
        finally:
            for step in back:
                step()

    def _source(self, name: str) -> str:
        """The name under which the folder stores a parameter: one of its own, where it is tied."""
        return next(other for other in self._names[name] if other in self.weights)

    def _check_names(self) -> None:
        """Refuse a folder whose tensors are not simply those of the model.

        Raises:
            InputError: Field ``memory.mode``.
        """
        lost = [name for name, others in self._names.items() if not any(other in self.weights for other in others)]
        odd = [name for name in self.weights.tensors if name not in self._state]
        for names, what in ((lost, "does not store"), (odd, "stores more than the model has:")):
            if names:
                raise InputError("memory.mode", f"the folder {what} {listed(names, 2)}", _REMEDY)
        for name, stored in self.weights.tensors.items():
            if stored.shape != tuple(self._state[name].shape):
                raise InputError("memory.mode", f"{name} is stored in another shape than the model has", _REMEDY)


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of a parameter -> all names of it."""
    alike: dict[int, list[str]] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        alike.setdefault(id(parameter), []).append(name)
    return {name: tuple(alike[id(parameter)]) for name, parameter in named}


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _restoring(
    registry: dict[str, nn.Parameter | None] | dict[str, Tensor | None], leaf: str, value: Tensor
) -> Callable[[], None]:
    def step() -> None:
        registry[leaf] = value  # type: ignore[assignment]  # what was there

    return step

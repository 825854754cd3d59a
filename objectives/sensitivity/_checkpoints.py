"""Gradient checkpointing of a model that was not written for it: blocks that are computed again instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What a model is a chain of: members of its outermost lists of modules that hold modules themselves.

    Single operators are left out: their hooks run outside their ``forward``, and they keep little but their input.

    Args:
        model: Any; one without lists has no blocks.
    """
    found: dict[int, nn.Module] = {}

    def look(module: nn.Module, *, listed: bool) -> None:
        for child in module.children():
            if isinstance(child, _LISTS):
                look(child, listed=True)
            elif listed:
                if any(True for _ in child.children()):
                    found[id(child)] = child
            else:
                look(child, listed=False)

    look(model, listed=isinstance(model, _LISTS))
    return list(found.values())


class Checkpoints:
    """Modules whose insides a backward pass computes again from their inputs.

    Attributes:
        again: Whether a module is being computed again now, so that its hooks have seen this call before.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self._modules = tuple(modules)
        self.again = False

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Keep inputs alone of calls made inside; backward passes of them belong inside as well."""
        with ExitStack() as stack:
            for module in self._modules:
                before = module.__dict__.get("forward")
                module.forward = self._checkpointed(module.forward)
                stack.callback(_restore, module, before)
            yield

    def _checkpointed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, context_fn=self._contexts)

        return run

    def _contexts(self) -> tuple[Any, Any]:
        return nullcontext(), _Again(self)


class _Again:
    """Entered while a module is computed again; once for every backward pass, which a generator's context cannot be."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def __enter__(self) -> None:
        self._checkpoints.again = True

    def __exit__(self, *_: object) -> None:
        self._checkpoints.again = False


def _restore(module: nn.Module, before: Any) -> None:
    if before is None:
        del module.forward
    else:
        module.forward = before

"""Records and machinery of the architecture tests: what an architecture is, random values, float64 arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from alphasmith.objectives.media.batch import Batch

HIDDEN = 32
HEADS = 4
KEY_VALUE_HEADS = 2
INNER = 48
VOCABULARY = 61
LAYERS = 2

BatchMaker = Callable[[torch.Generator, int], Batch]


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A site that must be foldable, with exactly these operators.

    Attributes:
        operators: Their names; ``{n}`` stands for every number in ``range(repeat)``.
        producers: Modules that must be among those that absorb 1/s, likewise.
        repeat: How many times the pattern occurs.
        tied: Number of different scales the site may have; None when every channel is free.
    """

    operators: tuple[str, ...]
    producers: tuple[str, ...]
    repeat: int = 1
    tied: int | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Operators whose input must not be folded.

    Attributes:
        operators: They share one site; ``{n}`` as in ``Folded``.
        mode: ``explicit`` or ``left``.
        repeat: How many times the pattern occurs.
    """

    operators: tuple[str, ...]
    mode: str = "explicit"
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family.

    Attributes:
        name: Test id.
        factory: Makes the model: evaluation mode, float64, the same values at every call.
        batch: ``batch(generator, samples)`` draws fresh input.
        folded: Sites that must be foldable; others may be.
        kept: Sites that must not be.
        skipped: Operators that must be reported as not quantizable.
    """

    name: str
    factory: Callable[[], nn.Module]
    batch: BatchMaker
    folded: tuple[Folded, ...] = ()
    kept: tuple[Kept, ...] = ()
    skipped: tuple[str, ...] = ()


class DoubleArithmetic(TorchFunctionMode):
    """Evaluate in float64 what a model asks to be computed in float32 (norms, softmax, routers).

    Folding moves rounding errors of 1e-16 around; a model that rounds to float32 on the way turns some of them into
    1e-7, which would hide a fold that is wrong by as little.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(
            *(torch.float64 if value is torch.float32 else value for value in args),
            **{k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()},
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a random value, in place; returns the model in float64, evaluating."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)

    def normal(value: torch.Tensor) -> torch.Tensor:
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)

    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                parameter.add_(0.3 * normal(parameter))
            else:
                parameter.copy_(normal(parameter) * parameter[0].numel() ** -0.5)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("running_var"):
                buffer.copy_(torch.exp(0.5 * normal(buffer)))
            elif name.endswith(("running_mean", "normalization.weight", "normalization.bias")):
                buffer.add_(0.3 * normal(buffer))
    return model


def pretrained(model: str, configuration: str, **settings: Any) -> Callable[[], nn.Module]:
    """Factory of a transformers model by class name, with random values and small special-token ids."""
    defaults = {"attn_implementation": "eager", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def factory() -> nn.Module:
        with _seeded(0):
            config = getattr(transformers, configuration)(**{**defaults, **settings})
            return randomise(getattr(transformers, model)(config))

    return factory


def randomly(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Factory of a hand-written model with random values."""

    def factory() -> nn.Module:
        with _seeded(0):
            return randomise(make())

    return factory


def tokens(generator: torch.Generator, samples: int) -> Batch:
    """Token batches without special tokens."""
    return Batch(kwargs={"input_ids": torch.randint(4, VOCABULARY, (samples, 6), generator=generator)})


def images(size: int, channels: int = 3, name: str | None = "pixel_values") -> BatchMaker:
    """Image batches, ``(samples, channels, size, size)``, float64."""

    def make(generator: torch.Generator, samples: int) -> Batch:
        pixels = torch.randn(samples, channels, size, size, generator=generator, dtype=torch.float64)
        return Batch(args=(pixels,)) if name is None else Batch(kwargs={name: pixels})

    return make


def attention(prefix: str, norm: str, *, kv_heads: int = KEY_VALUE_HEADS, output: str = "o_proj") -> tuple[Folded, ...]:
    """q, k, v behind one norm, and the output projection behind v; tied over the query heads of a key-value head."""
    return (
        Folded(
            operators=(f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"), producers=(norm,), repeat=LAYERS
        ),
        Folded(
            operators=(f"{prefix}.{output}",),
            producers=(f"{prefix}.v_proj",),
            repeat=LAYERS,
            tied=kv_heads * HIDDEN // HEADS,
        ),
    )

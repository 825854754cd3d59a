"""Outlier channels like those of large language models, put into a small model without changing what it computes.

Large models grow a few activation channels 20 to 100 times larger than the rest (arXiv 2208.07339, 2211.10438); small
ones do not. A norm's gain (and bias) of one channel is multiplied by g, and the input column of every linear behind it
is divided by g: the function stays, the activation between them gains an outlier. It is formula fA2/fA3 run backwards.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch, call


@dataclass(frozen=True, kw_only=True)
class NormPair:
    """A norm and every operator that reads its output.

    Attributes:
        norm: Module path of a norm with ``weight`` (C,) and possibly ``bias`` (C,).
        consumers: Module paths of all ``nn.Linear`` that read its output; nothing else may read it.
        offset: 1.0 for norms that multiply by (1 + weight).
        absmax: (C,) abs-max of the norm's output per channel, as ``find_pairs`` measures it: the largest channels become
            the outliers, as in large models, where they are far above all others. None: channels are drawn.
    """

    norm: str
    consumers: tuple[str, ...]
    offset: float = 0.0
    absmax: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class OutlierEdit:
    """What was done to one pair.

    Attributes:
        norm: Module path of the norm.
        consumers: Module paths of the linears.
        channels: Channels that were enlarged, ascending.
        gains: Factor of each.
    """

    norm: str
    consumers: tuple[str, ...]
    channels: tuple[int, ...]
    gains: tuple[float, ...]


def with_outliers(
    model: nn.Module,
    pairs: Sequence[NormPair],
    *,
    share: float = 0.01,
    gains: tuple[float, float] = (20.0, 60.0),
    seed: int = 0,
) -> tuple[nn.Module, tuple[OutlierEdit, ...]]:
    """A copy of ``model`` that computes the same with outlier channels.

    Args:
        model: Any model; not changed.
        pairs: Norms and the linears behind them.
        share: Share of each norm's channels that become outliers; at least one channel does.
        gains: Lowest and highest factor; factors are uniform between them.
        seed: Draws factors, and channels where no pair says which are largest.

    Returns:
        The copy and the list of what was changed, one entry per pair.

    Raises:
        InputError: A share or gain is out of range, a module is missing, has no gain, or does not fit its norm.
    """
    if not 0 < share <= 1:
        raise InputError("share", f"{share} is no share of the channels", "give a number in (0, 1]")
    if not 0 < gains[0] <= gains[1] < float("inf"):
        raise InputError("gains", f"{gains} is no range of factors", "give (low, high) with 0 < low <= high")
    changed = copy.deepcopy(model)
    modules = dict(changed.named_modules())
    generator = torch.Generator().manual_seed(seed)
    edits: list[OutlierEdit] = []
    for pair in pairs:
        weight = getattr(modules.get(pair.norm), "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            raise InputError("pairs", f"{pair.norm} is no norm with one gain per channel", "name a norm of the model")
        count = len(weight)
        consumers = [_linear(modules, name, count) for name in pair.consumers]
        order = torch.randperm(count, generator=generator)
        if pair.absmax is not None:
            order = pair.absmax.argsort(descending=True, stable=True)
        chosen = order[: max(1, round(share * count))].sort().values
        drawn = gains[0] + (gains[1] - gains[0]) * torch.rand(len(chosen), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weight[chosen] = ((weight[chosen].double() + pair.offset) * drawn - pair.offset).to(weight.dtype)
            bias = getattr(modules[pair.norm], "bias", None)
            if isinstance(bias, nn.Parameter):
                bias[chosen] = (bias[chosen].double() * drawn).to(bias.dtype)
            for consumer in consumers:
                consumer.weight[:, chosen] = (consumer.weight[:, chosen].double() / drawn).to(consumer.weight.dtype)
        edits.append(
            OutlierEdit(
                norm=pair.norm, consumers=pair.consumers, channels=tuple(chosen.tolist()), gains=tuple(drawn.tolist())
            )
        )
    return changed, tuple(edits)


def find_pairs(model: nn.Module, norms: Sequence[str], batch: Batch) -> tuple[NormPair, ...]:
    """The linears that are handed exactly the tensor each named norm returned in one forward pass, and its abs-max.

    Args:
        model: Run once without gradients.
        norms: Module paths of norms.
        batch: What the model is run on.

    Raises:
        InputError: A norm is missing, or no linear reads its output.
    """
    modules = dict(model.named_modules())
    produced: dict[str, torch.Tensor] = {}
    readers: dict[str, list[str]] = {name: [] for name in norms}
    handles = []

    def remember(name: str, output: torch.Tensor) -> None:
        produced[name] = output

    def compare(name: str, value: torch.Tensor) -> None:
        for norm, output in produced.items():
            if value is output:
                readers[norm].append(name)

    try:
        for norm in norms:
            if norm not in modules:
                raise InputError("norms", f"the model has no module {norm}", "name a norm of the model")
            handles.append(modules[norm].register_forward_hook(lambda _m, _a, out, n=norm: remember(n, out)))
        for name, module in modules.items():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(lambda _m, args, n=name: compare(n, args[0])))
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for norm, found in readers.items():
        if not found:
            raise InputError("norms", f"no linear reads the output of {norm}", "leave it out")
    return tuple(
        NormPair(norm=norm, consumers=tuple(found), absmax=produced[norm].flatten(0, -2).abs().amax(0))
        for norm, found in readers.items()
    )


def _linear(modules: dict[str, nn.Module], name: str, channels: int) -> nn.Linear:
    module = modules.get(name)
    if not isinstance(module, nn.Linear) or module.in_features != channels:
        raise InputError("pairs", f"{name} is no nn.Linear with {channels} inputs", "name the linears behind the norm")
    return module

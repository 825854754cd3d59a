"""The layers of a model in factored form wherever that has fewer numbers. Source: claim B-5, formulas fB5, fB6."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrize

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.low_rank.classes import layer_classes
from alphasmith.objectives.joint.low_rank.decomposition import Factors, Weighting, decompose, saving_rank
from alphasmith.objectives.joint.low_rank.factored import (
    FactoredConv,
    FactoredLinear,
    LowRankProduct,
    conv_matrices,
    low_rank_product,
)
from alphasmith.objectives.literals import ConvForm, LayerClass, SvdMetric
from alphasmith.objectives.text import matches

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN = frozenset(kind.forward for kind in (nn.Linear, *_CONVOLUTIONS))


@dataclass(frozen=True, kw_only=True)
class LowRankSettings:
    """How layers are decomposed.

    Attributes:
        energy: Share of the squared singular values to keep, one for all layers or one a class; used where no rank is given.
        rank: Rank in its place, likewise. Layers of a class that has neither stay as they are.
        metric: ``plain``; ``activation``: inputs weighted by their root mean square; ``whitened``: by their covariance. The last two
            take it from ``covariances``.
        conv_form: How kernels of two axes become matrices; others are always ``channel``.
        exclude: ``fnmatch`` patterns of layers that stay dense.
    """

    energy: float | Mapping[LayerClass, float] | None = 0.99
    rank: int | Mapping[LayerClass, int] | None = None
    metric: SvdMetric = "plain"
    conv_form: ConvForm = "channel"
    exclude: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class FactoredLayer:
    """What became of one layer.

    Attributes:
        name: Its dotted name.
        shape: Of its weight.
        rank: Of its factors; 0 where it stays dense.
        kept: Share of the squared singular values kept; 1 where it stays dense.
        numbers: Numbers of its weight now.
        runs: ``factored`` (two products in place of one), ``product`` (the factors are multiplied at every call, because the layer's
            own forward does more than the product), or ``dense``.
        reason: Why it stays dense; empty where it does not.
        notes: What the decomposition has to say.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    kept: float
    numbers: int
    runs: Literal["factored", "product", "dense"]
    reason: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    layer: nn.Module
    form: ConvForm
    groups: int
    factors: tuple[Factors, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What a class of layers keeps: an energy, or a rank in its place."""

    energy: float | None
    rank: int | None


def factorize(
    model: nn.Module,
    settings: LowRankSettings,
    *,
    covariances: Mapping[str, Tensor] | None = None,
    rows: Mapping[str, Tensor] | None = None,
) -> tuple[FactoredLayer, ...]:
    """Put factored layers into the place of linear ones and convolutions, where they have fewer numbers. Source: claim B-5, fB6.

    Recurrent layers and attention modules have their matrices where nothing else can stand; let
    :func:`~alphasmith.objectives.model.plain_operators.rewrite` take them apart first: the gates of an LSTM or a GRU are then one
    linear layer over the input and one over the state, and each is decomposed whole. A layer under two names, or whose weight
    another one has, stays dense.

    Factored layers are decomposed again, as the product of their factors: their rank may fall and never rises, and where it
    does not fall the factors stay as they are. Source: claim B-1.

    Args:
        model: Changed in place, so give a private copy. Nothing is changed when an error is raised.
        settings: How.
        covariances: Layer -> (I, I) mean of x x^T over its inputs, for convolutions over I / groups * kernel of the unfolded input;
            needed for the metrics ``activation`` and ``whitened``, of which the spatial form knows none.
        rows: Layer -> (O,) factor of its outputs by which errors count, e.g. gamma / sqrt(var + eps) of the normalization
            behind it where that is not folded.

    Returns:
        Every linear layer and convolution, factored ones included, in the order of the model.

    Raises:
        InputError: A setting is out of range, a covariance is missing or of another size, or a decomposition does not converge.
        NonFiniteError: A weight is NaN or infinite.
    """
    _check(settings)
    owners = _owners(model)
    classes = layer_classes(model)
    layers: list[FactoredLayer] = []
    plans: dict[str, _Plan] = {}
    for name, module in model.named_modules():
        if name not in classes:
            continue
        share = _share(settings, classes[name])
        now = _ranked(name, module)
        reason = _refused(name, module, owners, settings)
        if not reason and share is None:
            reason = f"no energy and no rank for {classes[name]} layers"
        plan = None
        if share is not None and not reason and (now is None or now.rank > 1):
            given = (name, module, settings, share, covariances or {}, rows or {})
            plan = _planned(*given) if now is None else _lowered(now.rank, *given)
        if now is not None and plan is None:
            layers.append(now)
            continue
        layers.append(_layer(name, module, plan, reason))
        if plan is not None and layers[-1].runs != "dense":
            plans[name] = plan
    for name, plan in plans.items():
        _install(model, name, plan)
    return tuple(layers)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerMatrices:
    """The weight of a dense layer as the matrices that are decomposed.

    Attributes:
        name: Its dotted name.
        shape: Of its weight.
        matrices: One a group, each with what its errors are measured in.
        energy: Share of the squared singular values asked for; None where a rank is.
        rank: The rank asked for; None where an energy is.
    """

    name: str
    shape: tuple[int, ...]
    matrices: tuple[tuple[Tensor, Weighting], ...]
    energy: float | None
    rank: int | None


def dense_matrices(
    model: nn.Module,
    settings: LowRankSettings,
    *,
    covariances: Mapping[str, Tensor] | None = None,
    rows: Mapping[str, Tensor] | None = None,
) -> Iterator[LayerMatrices]:
    """The layers that :func:`factorize` would put into factored form if a rank saved anything.

    Args:
        model: Not changed.
        settings: As for ``factorize``.
        covariances: As for ``factorize``.
        rows: As for ``factorize``.

    Raises:
        InputError: A setting is out of range, or a covariance is missing.
    """
    _check(settings)
    owners, classes = _owners(model), layer_classes(model)
    for name, module in model.named_modules():
        share = _share(settings, classes[name]) if name in classes else None
        if share is None or _ranked(name, module) is not None or _refused(name, module, owners, settings):
            continue
        weight = _weight(module)
        form, groups = _form(module, weight, settings)
        parts = conv_matrices(weight, groups, form)
        weightings = _weightings(name, parts, form, settings, covariances or {}, (rows or {}).get(name))
        yield LayerMatrices(
            name=name,
            shape=tuple(weight.shape),
            matrices=tuple(zip(parts, weightings, strict=True)),
            energy=share.energy,
            rank=share.rank,
        )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Weight -> all names of layers that have it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)) and low_rank_product(module) is None:
            owners.setdefault(id(module.weight), []).append(name)
    return owners


def _check(settings: LowRankSettings) -> None:
    for kind in {*_keys(settings.energy), *_keys(settings.rank)} - set(get_args(LayerClass)):
        raise InputError("svd", f"{kind!r} is no class of layers", f"use some of {', '.join(get_args(LayerClass))}")
    for field_name, value, known in (
        ("svd.metric", settings.metric, get_args(SvdMetric)),
        ("svd.form", settings.conv_form, get_args(ConvForm)),
    ):
        if value not in known:
            raise InputError(field_name, f"{value!r} is unknown", f"use one of {', '.join(known)}")
    if settings.rank is None and settings.energy is None:
        raise InputError("svd", "has neither an energy nor a rank", "give one of them")


def _keys(given: object) -> set[str]:
    return set(given) if isinstance(given, Mapping) else set()


def _share(settings: LowRankSettings, kind: LayerClass) -> _Share | None:
    """What layers of a class keep; None where they stay as they are."""
    energy = settings.energy.get(kind) if isinstance(settings.energy, Mapping) else settings.energy
    rank = settings.rank.get(kind) if isinstance(settings.rank, Mapping) else settings.rank
    if energy is None and rank is None:
        return None
    return _Share(energy=energy if rank is None else None, rank=rank)


def _ranked(name: str, module: nn.Module) -> FactoredLayer | None:
    """A layer that is factored already, as it is; None for any other."""
    product = low_rank_product(module)
    if not isinstance(module, (FactoredLinear, FactoredConv)) and product is None:
        return None
    factored = isinstance(module, (FactoredLinear, FactoredConv))
    parts = [p for key, p in module.named_parameters() if key != "bias"]
    return FactoredLayer(
        name=name,
        shape=tuple(_weight(module).shape),
        rank=module.rank if isinstance(module, (FactoredLinear, FactoredConv)) else (product.rank if product else 0),
        kept=1.0,
        numbers=sum(part.numel() for part in parts),
        runs="factored" if factored else "product",
    )


def _weight(module: nn.Module) -> Tensor:
    """(O, I / groups, kernel) what a layer multiplies with, factored or not."""
    if isinstance(module, (FactoredLinear, FactoredConv)):
        return module.dense_weight().detach()
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach()


def _form(module: nn.Module, weight: Tensor, settings: LowRankSettings) -> tuple[ConvForm, int]:
    """How the kernel becomes matrices, and how many groups it has; what is factored keeps its form."""
    product = low_rank_product(module)
    if isinstance(module, FactoredConv):
        return module.form, module.groups
    groups = module.groups if isinstance(module, _CONVOLUTIONS) else 1
    if product is not None:
        return product.form, groups
    return (settings.conv_form if weight.dim() == 4 else "channel"), groups


def _refused(name: str, module: nn.Module, owners: Mapping[int, list[str]], settings: LowRankSettings) -> str:
    if matches(name, settings.exclude):
        return f"{name} is excluded"
    if isinstance(module, (FactoredLinear, FactoredConv)) or low_rank_product(module) is not None:
        return ""
    if parametrize.is_parametrized(module):
        return "its weight is computed"
    shared = [other for other in owners[id(module.weight)] if other != name]
    return f"its weight is that of {shared[0]}" if shared else ""


def _planned(
    name: str,
    module: nn.Module,
    settings: LowRankSettings,
    share: _Share,
    covariances: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
) -> _Plan | None:
    """The factors of a dense layer, or None where no rank saves anything."""
    weight = _weight(module)
    form, groups = _form(module, weight, settings)
    most = saving_rank(*conv_matrices(weight, groups, form)[0].shape)
    if most < 1 or (share.rank is not None and share.rank > most):
        return None
    plan = _factors(name, module, settings, share, covariances, rows)
    return plan if plan.factors[0].rank <= most else None


def _lowered(
    rank: int,
    name: str,
    module: nn.Module,
    settings: LowRankSettings,
    share: _Share,
    covariances: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
) -> _Plan | None:
    """Factors of the product of a layer's factors, or None where they would not have a lower rank."""
    if share.rank is not None and share.rank >= rank:
        return None
    plan = _factors(name, module, settings, share, covariances, rows)
    return plan if plan.factors[0].rank < rank else None


def _factors(
    name: str,
    module: nn.Module,
    settings: LowRankSettings,
    share: _Share,
    covariances: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
) -> _Plan:
    weight = _weight(module)
    form, groups = _form(module, weight, settings)
    matrices = conv_matrices(weight, groups, form)
    weightings = _weightings(name, matrices, form, settings, covariances, rows.get(name))
    made = [
        decompose(one, energy=share.energy, rank=share.rank, weighting=weighting, name=f"{name}.weight")
        for one, weighting in zip(matrices, weightings, strict=True)
    ]
    rank = max(one.rank for one in made)
    if len({one.rank for one in made}) > 1:  # groups run in one call: the largest rank is theirs all
        made = [
            decompose(one, rank=rank, weighting=weighting, name=f"{name}.weight")
            for one, weighting in zip(matrices, weightings, strict=True)
        ]
    return _Plan(layer=module, form=form, groups=groups, factors=tuple(made))


def _weightings(
    name: str,
    matrices: Sequence[Tensor],
    form: ConvForm,
    settings: LowRankSettings,
    covariances: Mapping[str, Tensor],
    rows: Tensor | None,
) -> list[Weighting]:
    outputs = [None] * len(matrices) if rows is None else list(rows.chunk(len(matrices)))
    if form == "spatial":
        # Outputs are part of the columns there, each with every column of the kernel.
        width = matrices[0].shape[1]
        return [
            Weighting(columns=None if part is None else part.repeat_interleave(width // part.numel()))
            for part in outputs
        ]
    if settings.metric == "plain":
        return [Weighting(rows=part) for part in outputs]
    if name not in covariances:
        problem = f"the metric {settings.metric} needs the inputs of {name}"
        raise InputError("svd.metric", problem, "collect them on calibration data, or use plain")
    covariance = covariances[name]
    if settings.metric == "whitened":
        return [Weighting(rows=part, covariance=covariance) for part in outputs]
    return [Weighting(rows=part, columns=covariance.diagonal().clamp_min(0).sqrt()) for part in outputs]


def _layer(name: str, module: nn.Module, plan: _Plan | None, reason: str) -> FactoredLayer:
    shape = tuple(_weight(module).shape)
    if plan is None:
        reason = reason or "no rank that keeps enough has fewer numbers than the weight"
        return FactoredLayer(
            name=name, shape=shape, rank=0, kept=1.0, numbers=math.prod(shape), runs="dense", reason=reason
        )
    whole = sum(float(one.singular.double().square().sum()) for one in plan.factors)
    kept = sum(one.kept * float(one.singular.double().square().sum()) for one in plan.factors)
    factored = isinstance(module, (FactoredLinear, FactoredConv)) or type(module).forward in _PLAIN
    return FactoredLayer(
        name=name,
        shape=shape,
        rank=plan.factors[0].rank,
        kept=kept / whole if whole else 1.0,
        numbers=sum(one.left.numel() + one.right.numel() for one in plan.factors),
        runs="factored" if factored and low_rank_product(module) is None else "product",
        notes=tuple(dict.fromkeys(note for one in plan.factors for note in one.notes)),
    )


def _install(model: nn.Module, name: str, plan: _Plan) -> None:
    layer = plan.layer
    made: nn.Module
    product = low_rank_product(layer)
    if isinstance(layer, (FactoredLinear, FactoredConv)):
        layer.take(plan.factors)
    elif product is not None:
        product.take(layer, plan.factors)
    elif type(layer).forward not in _PLAIN:
        product = LowRankProduct(plan.factors, layer.weight.shape, plan.form)  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", product)
    else:
        if isinstance(layer, _CONVOLUTIONS):
            made = FactoredConv(layer, plan.factors, plan.form)
        else:
            made = FactoredLinear(plan.factors[0], layer.bias)  # type: ignore[arg-type]  # nn.Linear, by its forward
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made.train(layer.training))

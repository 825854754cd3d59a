"""Invented records of the size and shape of real ones, to measure storage on; no number in them is a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from alphasmith.objectives.literals import CandidateKind
from alphasmith.storage.database.connection import Database, optuna_storage
from alphasmith.storage.database.optuna_private import insert_trials
from alphasmith.storage.runs.entries import Group, Losses, LossPair, SearchFacts, SiteRecord
from alphasmith.storage.runs.records import RunSpec

#: Ends of the ranges of an alpha and of an offset.
_ALPHA, _OFFSET = (0.1, 0.9), (-5.0, 5.0)
#: Who proposes the first trials of a study; the others are the sampler's.
_FIRST: tuple[CandidateKind, ...] = ("identity", "alpha_0.5", "best_single", "noise_model")
_SHIFTS = ("none", "mean")
_BLOCK = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def space(groups: int, *, shift: bool = True) -> dict[str, BaseDistribution]:
    """Parameters of a site's study by default: an alpha and an offset per group, and the kind of shift."""
    made: dict[str, BaseDistribution] = {f"alpha_{k}": FloatDistribution(*_ALPHA) for k in range(groups)}
    made |= {f"offset_{k}": FloatDistribution(*_OFFSET) for k in range(groups)}
    return made | ({"shift": CategoricalDistribution(_SHIFTS)} if shift else {})


def finished_trial(
    generator: np.random.Generator, distributions: dict[str, BaseDistribution], *, kind: CandidateKind = "sampler"
) -> FrozenTrial:
    """A trial as a search records it: parameters, who proposed it, seconds, losses on three subsets of the rows."""
    loss = float(generator.uniform(1e-4, 1e-3))
    params = {
        name: choice.choices[int(generator.integers(len(choice.choices)))]
        if isinstance(choice, CategoricalDistribution)
        else float(generator.uniform(*(_ALPHA if name.startswith("alpha") else _OFFSET)))
        for name, choice in distributions.items()
    }
    trial = optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        value=loss,
        params=params,
        distributions=distributions,
        user_attrs={"candidate": kind, "seconds": 0.25},
        intermediate_values={step: loss * (1 + 1 / step) for step in (1, 2, 3)},
    )
    if trial.datetime_complete is not None:
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=0.25)
    return trial


def study_trials(count: int, *, groups: int, generator: np.random.Generator) -> list[FrozenTrial]:
    """Trials of one study: the baselines, the noise model's proposal, then the sampler's."""
    return [
        finished_trial(generator, space(groups), kind=_FIRST[n] if n < len(_FIRST) else "sampler") for n in range(count)
    ]


def record_study(database: Database, name: str, trials: Sequence[FrozenTrial]) -> None:
    """Make a study in Optuna's tables and put ended trials into it."""
    storage = optuna_storage(database)
    study = optuna.create_study(study_name=name, storage=storage)
    insert_trials(storage, storage.get_study_id_from_name(study.study_name), trials)


def site_name(position: int) -> str:
    """The site at a position of a LLaMA."""
    return f"model.layers.{position // len(_BLOCK)}.{_BLOCK[position % len(_BLOCK)]}"


def site_record(
    run_id: str, position: int, *, groups: int, trials: int, generator: np.random.Generator, channels: int = 4096
) -> SiteRecord:
    """A finished site with its groups and losses."""
    limit = float(10 ** generator.uniform(-4.2, -3.2))
    losses = Losses(
        identity=30 * limit,
        alpha_half=1.6 * limit,
        best_single=1.2 * limit,
        best_single_alpha=float(generator.uniform(0.4, 0.9)),
        ours=1.05 * limit,
        limit=limit,
    )
    name = site_name(position)
    return SiteRecord(
        name=name,
        position=position,
        mode="fold",
        channels=channels,
        operators=(name,),
        study=f"{run_id}/{name}",
        losses=LossPair(search=losses, held_out=losses),
        winner="sampler",
        trials=trials,
        exact_evaluations=3 * trials,
        seconds=0.25 * trials,
        groups=tuple(_group(k, channels // groups, generator) for k in range(groups)),
        grouping="kmeans",
        statistic="absmax",
        facts=SearchFacts(stopped="within 3 % of the limit", k_tried=(1, 2, groups)),
    )


def run_spec(name: str) -> RunSpec:
    """A run of the default kind."""
    return RunSpec(
        name=name,
        model_digest="5e" * 32,
        data_digest="77" * 32,
        config={"name": name, "groups": {"k": 4}},
        scheme="w8a8-channel-static",
        hardware={"rho": 0.0, "explanation": "nothing given"},
        scope="site",
        versions={"optuna": optuna.__version__},
        space_hash="",
    )


def _group(index: int, size: int, generator: np.random.Generator) -> Group:
    return Group(
        index=index,
        size=size,
        low=0.1 + 0.1 * index,
        high=0.6 + 0.1 * index,
        alpha=float(generator.uniform(*_ALPHA)),
        magnitude=float(10 ** generator.uniform(-1, 1.8)),
        explanation="magnitude in the lower half, rho = 0: the range of formula fA6",
        offset=float(generator.uniform(-0.4, 0.4)),
    )

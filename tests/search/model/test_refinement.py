"""Whole-model refinement: kinds, moves, order of trials, and a held-out judge that nothing gets past."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.literals import Variant
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing, smoothing_scales
from alphasmith.search.config import SearchConfig
from alphasmith.search.interruption import Interrupted, never
from alphasmith.search.model._settings import (
    KINDS_MAX,
    OTHER_KINDS,
    Change,
    SearchedSite,
    Setting,
    SettingSpace,
    site_kinds,
)
from alphasmith.search.model.refinement import RefinementResult, costs_to_come, refine
from alphasmith.search.study.study_record import StoredLog
from alphasmith.search.study.trial import Trial
from alphasmith.search.study.types import StudyContext
from alphasmith.storage.runs.data_frames import REFINEMENT_KINDS, REFINEMENT_SITES
from tests.support.quantized_models import Example, block_example

optuna.logging.set_verbosity(optuna.logging.WARNING)
SAMPLES = 40
Contributions = Callable[[Sequence[Mapping[str, Smoothing]]], Sequence[Mapping[str, float]]]


def smoothing(alpha: float) -> Smoothing:
    """A site of one channel whose log scale is its alpha."""
    return Smoothing(scales=torch.tensor([alpha], dtype=torch.float32).exp())


def moved(alpha: float) -> Callable[[float], Smoothing]:
    return lambda shift: smoothing(min(1.0, max(0.0, alpha + shift)))


def site(
    name: str, alpha: float, *, single: float | None = None, one: float | None = None, loss: float = 0.0
) -> SearchedSite:
    """A site won by ``alpha``; its best single alpha is the same unless given; ``one`` is that of the whole model."""
    choices: dict[Variant, Callable[[float], Smoothing]] = {
        "identity": lambda _: smoothing(0.0),
        "alpha_0.5": moved(0.5),
        "best_single": moved(alpha if single is None else single),
        "ours": moved(alpha),
    }
    if one is not None:
        choices["one_alpha"] = moved(one)
    return SearchedSite(name=name, operators=(name,), choices=choices, loss=loss)


class Bowl:
    """An output whose loss is 1 plus the squared distance of alphas and log ranges to a target, scattered over samples."""

    def __init__(
        self,
        targets: Mapping[str, float],
        *,
        ranges: Mapping[str, float] | None = None,
        seed: int = 0,
        samples: int = SAMPLES,
        scatter: float = 0.1,
        broken: Callable[[Mapping[str, float]], bool] = lambda alphas: False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = targets
        self.ranges = ranges or {}
        self.weight = 7.0 * samples
        self.evaluations = 0
        self.seen: list[dict[str, float]] = []
        self.broken = broken
        self._noise = scatter * torch.randn(samples, generator=generator, dtype=torch.float64)

    def sample_errors(self, smoothings: Mapping[str, Smoothing]) -> Tensor:
        self.evaluations += 1
        alphas = {name: round(float(s.scales.log()), 5) for name, s in smoothings.items()}
        self.seen.append(alphas)
        if self.broken(alphas):
            raise NonFiniteError("the candidate's output on batch 0 is NaN or infinite")
        distance = sum((alphas[name] - target) ** 2 for name, target in self.targets.items())
        for name, target in self.ranges.items():
            distance += math.log(smoothings[name].range_factor / target) ** 2
        return 7.0 * (1 + distance + distance * self._noise)

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: Tensor | None = None,
        protected: int = 0,
        fewest: int = 3,
        confidence: float = 3.0,
    ) -> list[ModelScore]:
        scores = []
        for index, candidate in enumerate(candidates):
            try:
                errors = self.sample_errors(candidate)
            except NonFiniteError as error:
                scores.append(
                    ModelScore(loss=None, samples=0, errors=torch.zeros(0), stopped=False, failure=str(error))
                )
                continue
            loss = float(errors.sum()) / self.weight
            worse = incumbent is not None and loss > 1.5 * float(incumbent.sum()) / self.weight
            stopped = worse and index >= protected
            scores.append(
                ModelScore(
                    loss=None if stopped else loss, samples=len(errors), errors=errors, stopped=stopped, failure=""
                )
            )
        return scores

    def remember(self, smoothings: Mapping[str, Smoothing]) -> ModelScore:
        return self.race([smoothings], protected=1)[0]

    def loss(self, alphas: Mapping[str, float]) -> float:
        return float(self.sample_errors({n: smoothing(a) for n, a in alphas.items()}).sum()) / self.weight


def settings(trials: int, seed: int = 0) -> SearchConfig:
    """Of a refinement with as many trials, fewer than a configuration may ask for too."""
    return SearchConfig().model_copy(update={"refine_trials": trials, "seed": seed})


def play(
    sites: Sequence[SearchedSite],
    judge: Bowl,
    reserve: Bowl,
    *,
    trials: int = 40,
    static: bool = True,
    contexts: Callable[[str], StudyContext] | None = None,
    contributions: Contributions | None = None,
) -> RefinementResult:
    ticks = itertools.count()
    return refine(
        sites,
        cast(ModelObjective, judge),
        cast(ModelObjective, reserve),
        settings(trials),
        static=static,
        contexts=contexts or (lambda _: StudyContext(clock=lambda: float(next(ticks)))),
        contributions=contributions,
    )


def alphas_of(result: RefinementResult) -> dict[str, float]:
    return {name: float(s.scales.log()) for name, s in result.smoothings.items()}


def trials_of(result: RefinementResult) -> list[Trial[Change]]:
    return [trial for step in result.steps for trial in step.results]


# ---------------------------------------------------------------------------------------------------------- kinds


def named(*operators: str, loss: float = 0.0) -> SearchedSite:
    return SearchedSite(name=operators[0], operators=operators, choices={"ours": moved(0.5)}, loss=loss)


def test_kinds_are_the_last_names_of_the_operators_without_layer_numbers() -> None:
    sites = []
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        sites += [
            named(*(f"{prefix}.self_attn.{p}_proj" for p in "qkv")),
            named(f"{prefix}.self_attn.o_proj"),
            named(f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"),
            named(f"{prefix}.mlp.down_proj"),
        ]
    sites.append(named("lm_head"))
    kinds = site_kinds(sites)
    assert list(kinds) == ["q_proj,k_proj,v_proj", "o_proj", "gate_proj,up_proj", "down_proj", "lm_head"]
    assert kinds["down_proj"] == tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(3))
    assert sorted(itertools.chain(*kinds.values())) == sorted(s.name for s in sites)


def test_kinds_that_end_alike_are_told_apart() -> None:
    prefixes = [f"encoder.layer.{layer}" for layer in range(2)]
    ends = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    kinds = site_kinds([named(f"{prefix}.{end}") for prefix in prefixes for end in ends])
    assert len(kinds) == 4
    assert all(len(names) == 2 for names in kinds.values())
    assert {"attention.output.dense", "layer.output.dense"} <= set(kinds)


def test_numbers_in_names_of_stages_are_no_kinds() -> None:
    kinds = site_kinds([named(f"layer{stage}.{block}.conv2") for stage in (1, 2) for block in (0, 1)])
    assert list(kinds) == ["conv2"]
    experts = [f"mlp.experts.{e}.{w}" for e in range(8) for w in ("w1", "w3")]
    assert list(site_kinds([named("mlp.gate", *experts)])) == ["gate,w1,w3"]
    assert site_kinds([named("0"), named("2")]) == {"0": ("0",), "2": ("2",)}  # nothing but numbers: no kind to share


def test_without_repeated_kinds_every_site_is_one_and_the_rest_is_together() -> None:
    few = site_kinds([named("norm.fc1"), named("fc2"), named("head")])
    assert few == {"fc1": ("norm.fc1",), "fc2": ("fc2",), "head": ("head",)}
    many = site_kinds([named(f"op_{letter}", loss=float(i)) for i, letter in enumerate("abcdefgh")])
    assert len(many) == KINDS_MAX
    assert many[OTHER_KINDS] == ("op_a", "op_b", "op_c")  # the smallest site losses
    repeated = [named(f"layers.{i}.{letter}") for i in range(2) for letter in "abcdef"]
    assert "h" in site_kinds([named("h"), *repeated])[OTHER_KINDS]


# ------------------------------------------------------------------------------------------------------ decisions


def test_nothing_changes_where_the_winners_are_best() -> None:
    targets = {"layers.0.a": 0.3, "layers.0.b": 0.8, "layers.1.a": 0.4}
    result = play([site(n, a) for n, a in targets.items()], Bowl(targets), Bowl(targets, seed=1))
    assert not result.accepted
    assert "nothing tried" in result.reason
    assert result.changed == {}
    assert set(result.settings.values()) == {Setting()}
    assert result.overall.before == result.overall.after == pytest.approx(1.0)
    assert result.overall.difference == 0
    assert alphas_of(result) == pytest.approx(targets)


def test_a_kind_with_bad_winners_takes_another_choice() -> None:
    targets = {"layers.0.fc": 0.3, "layers.1.fc": 0.9, "layers.0.gate": 0.35, "layers.1.gate": 0.55}
    sites = [site(n, a if n.endswith("fc") else 1.0, single=a) for n, a in targets.items()]
    result = play(sites, Bowl(targets), Bowl(targets, seed=1))
    assert result.accepted
    assert alphas_of(result) == pytest.approx(targets)
    assert {result.settings[name].choice for name in targets if name.endswith("gate")} == {"best_single"}
    overall = result.overall
    assert overall.before is not None
    assert overall.after is not None
    assert overall.difference == pytest.approx(overall.before - overall.after)
    assert overall.standard_error is not None
    assert overall.difference is not None
    assert overall.difference > overall.standard_error > 0
    assert overall.after == pytest.approx(Bowl(targets, seed=1).loss(alphas_of(result)))


def test_a_single_bad_site_is_mended_by_the_second_step() -> None:
    targets = {f"layers.{i}.fc": 0.4 if i % 2 else 0.6 for i in range(8)}
    bad = "layers.3.fc"
    sites = [site(n, 0.6 if n == bad else a, loss=float(n == bad)) for n, a in targets.items()]
    result = play(sites, Bowl(targets), Bowl(targets, seed=1))
    coarse, fine = result.steps
    assert (coarse.name, fine.name) == ("kinds", "sites")
    assert fine.accepted
    assert next(iter(fine.units)) == bad, "the largest loss first"
    assert alphas_of(result)[bad] == pytest.approx(0.4, abs=0.06)
    assert fine.after is not None
    assert fine.before is not None
    assert fine.after - 1 < (fine.before - 1) / 2


def test_sites_are_moved_in_the_order_of_what_they_add_at_the_output() -> None:
    targets = {f"layers.{i}.fc": 0.4 if i % 2 else 0.6 for i in range(20)}
    felt = {"layers.7.fc": 0.6, "layers.12.fc": 0.3, "layers.2.fc": 0.1}
    sites = [site(n, 0.6 if n == "layers.7.fc" else a, loss=float(i)) for i, (n, a) in enumerate(targets.items())]
    asked: list[Sequence[Mapping[str, Smoothing]]] = []

    def contributions(rivals: Sequence[Mapping[str, Smoothing]]) -> Sequence[Mapping[str, float]]:
        asked.append(rivals)
        return [felt for _ in rivals]

    result = play(sites, Bowl(targets), Bowl(targets, seed=1), contributions=contributions)
    order = list(result.steps[1].units)
    assert order[:7] == [*felt, "layers.19.fc", "layers.18.fc", "layers.17.fc", "layers.16.fc"], (
        "then by their own losses"
    )
    (rivals,) = asked
    assert all(set(rival) == set(targets) for rival in rivals)
    assert alphas_of(result)["layers.7.fc"] == pytest.approx(0.4, abs=0.06)


def test_a_choice_without_its_margin_ends_at_the_largest_calibrated_magnitude() -> None:
    def with_margin(factor: float) -> SearchedSite:
        plain = site("a", 0.5)
        return replace(plain, choices={**plain.choices, "ours": lambda _: replace(smoothing(0.5), range_factor=factor)})

    for factor, least in ((1.6, 0.625), (8.0, 0.25), (1.0, 1.0), (0.9, 1.0)):
        assert with_margin(factor).without_margin("ours") == Setting(choice="ours", range=least)


@pytest.mark.parametrize("right", [True, False])
def test_moves_that_are_predicted_to_pay_are_tried_together_and_judged_like_any_other(right: bool) -> None:
    targets = {f"layers.{i}.fc": 0.4 if i % 2 else 0.6 for i in range(8)}
    sites = [site(name, 0.5, loss=1.0) for name in targets]

    def contributions(rivals: Sequence[Mapping[str, Smoothing]]) -> Sequence[Mapping[str, float]]:
        told = [{n: abs(float(s.scales.log()) - targets[n]) for n, s in rival.items()} for rival in rivals]
        return told if right else [{n: math.exp(-10 * value) for n, value in of_sites.items()} for of_sites in told]

    result = play(sites, Bowl(targets), Bowl(targets, seed=1), trials=9, contributions=contributions)
    first, leap, *_ = result.steps[1].results
    assert first.candidate.kind == "ours"
    moved = {name for name in targets if leap.candidate.settings[name] != first.candidate.settings[name]}
    assert len(moved) >= len(targets) / 2
    assert bool(leap.better) == right
    overall = result.overall
    assert overall.after is not None
    assert overall.before is not None
    assert overall.after < 1.02 if right else overall.after <= overall.before


def test_what_is_likely_to_be_scored_is_told_for_both_studies() -> None:
    targets = {f"layers.{i}.{kind}": 0.6 for i in range(4) for kind in ("up", "down")}
    sites = [site(name, 0.4, single=0.45, one=0.42) for name in targets]
    few, many = (costs_to_come(sites, settings(trials)) for trials in (4, 1000))
    assert {name: len(costs) for name, costs in few.items()} == {
        REFINEMENT_KINDS: 1 + 4 + 2,
        REFINEMENT_SITES: 1 + 3 + 1,
    }
    assert len(many[REFINEMENT_KINDS]) < 40, "no more than there are moves"
    assert len(many[REFINEMENT_SITES]) < 60, "no more than until patience ends"
    assert all(cost > 0 for costs in many.values() for cost in costs)


def test_a_kind_that_sits_too_low_is_moved_and_the_other_is_not() -> None:
    targets = {f"layers.{i}.{kind}": 0.7 for i in range(4) for kind in ("up", "down")}
    sites = [site(name, 0.55 if name.endswith("up") else 0.7) for name in targets]
    result = play(sites, Bowl(targets), Bowl(targets, seed=1))
    assert result.accepted
    assert set(result.changed) == {name for name in targets if name.endswith("up")}
    assert alphas_of(result) == pytest.approx(targets)
    assert all("alphas +0.150" in words for words in result.changed.values())


@pytest.mark.parametrize("static", [True, False])
def test_static_ranges_are_clipped_and_widened_where_the_output_gains(static: bool) -> None:
    targets = {f"layers.{i}.{kind}": 0.6 for i in range(2) for kind in ("up", "down")}
    ranges = {name: 0.64 if name.endswith("up") else 1.15 for name in targets}
    sites = [site(name, 0.6) for name in targets]
    result = play(sites, Bowl(targets, ranges=ranges), Bowl(targets, ranges=ranges, seed=1), static=static)
    found = {name: s.range_factor for name, s in result.smoothings.items()}
    assert found == (pytest.approx(ranges) if static else dict.fromkeys(targets, 1.0))
    assert result.accepted == static


@pytest.mark.parametrize(
    ("kind", "target", "one"), [("best_single", None, None), ("identity", 0.0, None), ("one_alpha", 0.85, 0.85)]
)
def test_a_plain_choice_for_the_whole_model_can_win(kind: Variant, target: float | None, one: float | None) -> None:
    targets = {f"layers.{i}.fc": 0.2 + 0.1 * i if target is None else target for i in range(8)}
    single = {name: value if target is None else 0.4 for name, value in targets.items()}
    sites = [site(name, 0.9 - 0.1 * i, single=single[name], one=one) for i, name in enumerate(targets)]
    result = play(sites, Bowl(targets), Bowl(targets, seed=1), trials=5)
    assert result.accepted
    assert {setting.choice for setting in result.settings.values()} == {kind}
    assert alphas_of(result) == pytest.approx(targets)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_kept_is_never_worse_on_held_out_data_beyond_its_scatter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    alphas, search, held_out = torch.rand(3, 5, generator=generator).tolist()
    names = [f"layers.{i}.fc{i % 2}" for i in range(5)]
    judge, reserve = (Bowl(dict(zip(names, t, strict=True)), seed=s) for t, s in ((search, 1), (held_out, 2)))
    sites = [site(n, a, single=s) for n, a, s in zip(names, alphas, search, strict=True)]
    result = play(sites, judge, reserve)
    overall = result.overall
    assert overall.before is not None
    assert overall.after is not None
    assert reserve.loss(alphas_of(result)) == pytest.approx(overall.after, rel=1e-4)
    assert overall.after <= overall.before + (overall.standard_error or 0.0)
    if not result.accepted:
        assert overall.after == overall.before
        assert alphas_of(result) == pytest.approx(dict(zip(names, alphas, strict=True)), abs=1e-6)


def test_a_gain_within_its_standard_error_is_refused_unless_the_choice_is_simpler() -> None:
    targets = {"a": 0.62, "b": 0.3}
    ours = [site("a", 0.7), site("b", 0.3)]
    noisy = Bowl(targets, seed=3, scatter=2000.0)
    refused = play(ours, Bowl(targets), noisy)
    assert not refused.accepted
    assert "within its standard error" in refused.reason or "does not fall" in refused.reason
    simpler = play([site("a", 0.7, single=0.62), site("b", 0.3)], Bowl(targets), noisy)
    assert {setting.choice for setting in simpler.settings.values()} == {"best_single"}
    single = play(ours, Bowl(targets), Bowl(targets, samples=1))
    assert not single.accepted
    assert single.steps[0].standard_error is None
    assert "one held-out sample" in single.reason


# ----------------------------------------------------------------------------------------------------- breakdowns


def test_non_finite_candidates_are_failed_trials_with_a_reason() -> None:
    targets = {"layers.0.a": 0.5, "layers.0.b": 0.5}
    sites = [site(name, 0.7, single=0.9) for name in targets]
    judge = Bowl(targets, broken=lambda alphas: max(alphas.values()) > 0.75)
    result = play(sites, judge, Bowl(targets, seed=1))
    failed = [r for r in trials_of(result) if r.state == "FAIL"]
    assert failed
    assert all(r.loss is None and "NaN" in r.reason for r in failed)
    assert result.accepted
    assert max(alphas_of(result).values()) <= 0.75


def test_a_refinement_whose_trials_all_fail_changes_nothing() -> None:
    targets = {"a": 0.5}
    judge = Bowl(targets, broken=lambda alphas: True)
    result = play([site("a", 0.9)], judge, Bowl(targets))
    assert not result.accepted
    assert result.steps[0].reason == "every trial failed"
    assert all(r.state == "FAIL" for r in trials_of(result))
    assert result.overall.after == result.overall.before


def test_winners_that_break_the_output_are_replaced() -> None:
    targets = {"a": 0.5, "b": 0.5}

    def broken(alphas: Mapping[str, float]) -> bool:
        return alphas["a"] > 0.89

    result = play([site("a", 0.9), site("b", 0.5)], Bowl(targets, broken=broken), Bowl(targets, broken=broken))
    assert result.accepted
    assert result.overall.before is None
    assert result.overall.after == pytest.approx(1.0, abs=0.1)
    assert result.steps[0].results[0].state == "FAIL"


def test_a_best_trial_that_breaks_on_held_out_data_is_refused() -> None:
    targets = {"a": 0.5}
    reserve = Bowl(targets, broken=lambda alphas: alphas["a"] < 0.85)
    result = play([site("a", 0.9)], Bowl(targets), reserve)
    assert not result.accepted
    assert "not finite on held-out" in result.reason
    assert result.overall.after == result.overall.before


@pytest.mark.parametrize(
    ("sites", "trials", "field"),
    [
        ([], 16, "sites"),
        ([named("a"), named("a")], 16, "sites"),
        ([named("a")], 0, "trials"),
        ([SearchedSite(name="a", operators=("a",), choices={})], 16, "sites"),
    ],
)
def test_what_cannot_be_refined_is_refused(sites: list[SearchedSite], trials: int, field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}:"):
        play(sites, Bowl({}), Bowl({}), trials=trials)


# -------------------------------------------------------------------------------------------------- order and record


def test_plain_choices_come_first_and_the_budget_is_kept() -> None:
    targets = {f"layers.{i}.{kind}": 0.6 for i in range(2) for kind in ("up", "down")}
    sites = [site(name, 0.4, single=0.45, one=0.42) for name in targets]
    for trials in (1, 2, 3, 5, 16):
        judge = Bowl(targets)
        result = play(sites, judge, Bowl(targets, seed=1), trials=trials)
        kinds, single = result.steps
        assert [r.number for r in kinds.results] == list(range(len(kinds.results)))
        plain = ["ours", "best_single", "one_alpha", "alpha_0.5", "identity"]
        assert [r.candidate.kind for r in kinds.results][:5] == plain[:trials]
        assert max(len(kinds.results), len(single.results)) <= trials
        # A better move is scored once more only where moves of another site follow it.
        again = judge.evaluations - len(trials_of(result))
        assert 0 <= again <= sum(bool(trial.better) for trial in single.results)
        assert result.evaluations <= judge.evaluations + 4
    assert judge.seen[0] == pytest.approx(dict.fromkeys(targets, 0.4))


def test_a_unit_without_a_part_in_the_loss_is_left_soon() -> None:
    sites = [site("layers.0.up", 0.42, loss=1.0), site("layers.0.pooler", 0.8)]
    result = play(sites, Bowl({"layers.0.up": 0.5}), Bowl({"layers.0.up": 0.5}))
    proposals = [r.candidate for r in result.steps[0].results if r.candidate.kind == "proposal"]
    moves = [b for a, b in itertools.pairwise(proposals) if a.settings["pooler"] != b.settings["pooler"]]
    assert 1 <= len(moves) <= 4
    assert not result.steps[0].results[-1].better


def test_the_same_again_is_the_same() -> None:
    targets = {f"layers.{i}.{kind}": 0.6 for i in range(2) for kind in ("up", "down")}
    sites = [site(name, 0.4, single=0.45) for name in targets]
    first, again = (play(sites, Bowl(targets), Bowl(targets, seed=1)) for _ in range(2))
    assert [r.candidate for r in trials_of(first)] == [r.candidate for r in trials_of(again)]
    assert (first.overall, first.changed, first.settings) == (again.overall, again.changed, again.settings)


def recorded(storage: optuna.storages.BaseStorage, stop: Callable[[], bool] = never) -> Callable[[str], StudyContext]:
    """Contexts whose studies are kept in a storage."""
    return lambda name: StudyContext(log=StoredLog(storage, name), name=name, stop=stop)


def test_every_trial_is_an_optuna_trial_with_its_attributes() -> None:
    targets = {f"layers.{i}.fc": 0.5 for i in range(3)}
    sites = [site(n, 0.8, single=0.6) for n in targets]
    storage = optuna.storages.InMemoryStorage()
    judge = Bowl(targets, broken=lambda alphas: alphas["layers.1.fc"] < 0.4)
    result = play(sites, judge, Bowl(targets), contexts=recorded(storage))
    for step, name in zip(result.steps, (REFINEMENT_KINDS, REFINEMENT_SITES), strict=True):
        study = optuna.load_study(study_name=name, storage=storage)
        assert step.study_name == name
        assert study.user_attrs["device"] == "cpu"
        assert {unit: tuple(names) for unit, names in study.user_attrs["units"].items()} == dict(step.units)
        for trial, found in zip(study.trials, step.results, strict=True):
            assert trial.state.name == found.state
            assert trial.value == found.loss
            assert trial.user_attrs["candidate"] == found.candidate.kind
            assert trial.user_attrs["seconds"] == found.seconds
            assert trial.user_attrs.get("reason", "") == found.reason
            assert trial.user_attrs.get("better") == found.better
        # Every trial has every parameter, so any sampler could learn from all of them.
        assert len({frozenset(trial.params) for trial in study.trials}) == 1


@given(
    choice=st.sampled_from(["identity", "alpha_0.5", "best_single", "ours"]),
    shift=st.floats(-1, 1),
    factor=st.floats(0.25, 2),
)
def test_parameters_come_back_as_the_change_they_were_made_of(choice: Variant, shift: float, factor: float) -> None:
    sites = [site("layers.0.up", 0.4), site("layers.0.down", 0.6)]
    space = SettingSpace(sites, {s.name: (s.name,) for s in sites}, {s.name: Setting() for s in sites})
    change = Change(settings={"layers.0.up": Setting(choice, shift, factor), "layers.0.down": Setting()})
    assert space.candidate("proposal", space.params(change)) == change
    assert all(d._contains(d.to_internal_repr(space.params(change)[n])) for n, d in space.distributions().items())


# --------------------------------------------------------------------------------------------------- a real model


BAD = "q"


def loud_block() -> Example:
    """A block with one norm channel 60 times as large, undone in the weights that read it; the function is the same."""
    example = block_example()
    with torch.no_grad():
        for name, factor in (("norm.weight", 60.0), ("norm.bias", 60.0)):
            example.model.get_parameter(name)[2] *= factor
        for name in ("q.weight", "k.weight"):
            example.model.get_parameter(name)[:, 2] /= 60.0
    found = example.ranges[BAD]
    factors = torch.ones(9).index_fill(0, torch.tensor([2]), 60.0)
    return replace(example, ranges=example.ranges | {BAD: ChannelRange(found.low * factors, found.high * factors)})


def real_site(example: Example, found: Site) -> SearchedSite:
    """A site won by alpha 0.5, or by identity where that is bad."""
    weights = [example.model.get_parameter(o.weight) for o in found.operators]
    columns = [w.abs().amax(1 if o.transposed else 0) for w, o in zip(weights, found.operators, strict=True)]

    def single(alpha: float) -> Callable[[float], Smoothing]:
        peaks, most = example.ranges[found.name].peaks(), torch.stack(columns).amax(0).detach()
        return lambda shift: Smoothing(scales=smoothing_scales(peaks, most, min(1.0, max(0.0, alpha + shift))))

    def identity(_: float) -> Smoothing:
        return Smoothing(scales=torch.ones(found.channels))

    return SearchedSite(
        name=found.name,
        operators=tuple(o.name for o in found.operators),
        choices={
            "identity": identity,
            "alpha_0.5": single(0.5),
            "best_single": single(0.6),
            "ours": identity if found.name == BAD else single(0.5),
        },
    )


def random_batches(seed: int, count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [Batch(args=(torch.randn(4, 5, 9, generator=generator),)) for _ in range(count)]


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_a_real_model_is_refined_at_its_output(loss: Literal["mse", "kl"]) -> None:
    example = loud_block()
    candidate = CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme())
    judge, reserve = (ModelObjective(candidate, random_batches(seed), loss=loss) for seed in (1, 2))
    sites = [real_site(example, found) for found in example.sites]
    first, again = (refine(sites, judge, reserve, settings(12, seed=3)) for _ in range(2))
    assert first.accepted
    assert BAD in first.changed
    before, after = first.overall.before, first.overall.after
    assert before is not None
    assert after is not None
    assert after == pytest.approx(reserve.loss(first.smoothings))
    assert after < before / 2
    assert before == pytest.approx(reserve.loss({s.name: s.choices["ours"](0.0) for s in sites}))
    assert [r.candidate for r in trials_of(again)] == [r.candidate for r in trials_of(first)]
    assert again.overall == first.overall
    assert first.kinds == {"q,k": ("q",), "down": ("down",), "out": ("out",), "head": ("head",)}


def test_a_task_metric_cannot_be_refined() -> None:
    example = loud_block()
    candidate = CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme())
    objective = ModelObjective(candidate, random_batches(1), loss=lambda model, batches: 1.0)
    with pytest.raises(InputError, match="task metric"):
        refine([real_site(example, found) for found in example.sites], objective, objective, SearchConfig())
    assert objective.evaluations == 0


def test_a_refinement_cut_anywhere_goes_on_as_if_nothing_had_happened() -> None:
    targets = {f"layers.{i}.fc": 0.47 + 0.03 * i for i in range(3)}
    sites = [site(n, 0.8, single=0.6) for n in targets]
    undisturbed = play(sites, judge := Bowl(targets), Bowl(targets), trials=14)
    whole = judge.evaluations
    for cut in range(1, whole):
        storage = optuna.storages.InMemoryStorage()
        asked = iter(range(1000))
        with contextlib.suppress(Interrupted):
            stopped = recorded(storage, stop=lambda: next(asked) > cut)  # noqa: B023
            play(sites, Bowl(targets), Bowl(targets), trials=14, contexts=stopped)
        known = sum(len(storage.get_all_trials(study._study_id)) for study in storage.get_all_studies())
        again = play(sites, judge := Bowl(targets), Bowl(targets), trials=14, contexts=recorded(storage))
        assert [(r.candidate, r.loss, r.state, r.better) for r in trials_of(again)] == [
            (r.candidate, r.loss, r.state, r.better) for r in trials_of(undisturbed)
        ]
        assert (again.overall, again.changed) == (undisturbed.overall, undisturbed.changed)
        assert judge.evaluations <= whole - known + 2, "what is on record is not scored again, but for the one to beat"


def test_where_the_record_differs_from_the_replay_it_counts_as_it_is() -> None:
    targets = {f"layers.{i}.{kind}": 0.6 for i in range(2) for kind in ("up", "down")}
    storage = optuna.storages.InMemoryStorage()
    one, other = ([site(name, alpha, single=0.45) for name in targets] for alpha in (0.4, 0.35))
    before = play(one, Bowl(targets), Bowl(targets), trials=14, contexts=recorded(storage))
    # Other moves are asked for than those on record, as by another version.
    after = play(other, Bowl(targets, broken=lambda a: False), Bowl(targets), trials=14, contexts=recorded(storage))
    kinds = after.steps[0]
    assert [r.loss for r in kinds.results[: len(before.steps[0].results)]] == [r.loss for r in before.steps[0].results]
    assert [r.number for r in kinds.results] == list(range(len(kinds.results)))

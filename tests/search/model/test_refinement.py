"""Whole-model refinement: kinds, order of trials, and a held-out judge that nothing gets past."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import optuna
import pytest
import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.judge.model_objective import ModelObjective, ModelScore
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange, Smoothing, smoothing_scales
from alphasmith.search.config import SearchConfig
from alphasmith.search.interruption import Interrupted, never
from alphasmith.search.model._refinement_space import (
    DELTA_MAX,
    KINDS_MAX,
    OTHER_KINDS,
    Change,
    RefinableSite,
    site_kinds,
)
from alphasmith.search.model.refinement import RefinementResult, refine
from alphasmith.search.study.study_record import StoredLog
from alphasmith.search.study.trial import Trial
from alphasmith.search.study.types import StudyContext
from tests.support.quantized_models import Example, block_example

optuna.logging.set_verbosity(optuna.logging.WARNING)
SAMPLES = 40


def smoothing(alpha: float) -> Smoothing:
    """A site of one channel whose log scale is its alpha."""
    return Smoothing(scales=torch.tensor([alpha], dtype=torch.float32).exp())


def site(name: str, alpha: float, *, single: float | None = None, loss: float = 0.0) -> RefinableSite:
    """A site won by ``alpha``; its best single alpha is the same unless given."""
    choices = {"ours": alpha, "best_single": alpha if single is None else single, "alpha_0.5": 0.5}
    return RefinableSite(
        name=name,
        operators=(name,),
        rescale=lambda delta: smoothing(min(1.0, max(0.0, alpha + delta))),
        choices={choice: smoothing(value) for choice, value in choices.items()} | {"identity": smoothing(0.0)},
        loss=loss,
    )


class Bowl:
    """An output whose loss is 1 plus the squared distance of the alphas to a target, scattered over samples."""

    def __init__(
        self,
        targets: Mapping[str, float],
        *,
        seed: int = 0,
        samples: int = SAMPLES,
        scatter: float = 0.1,
        broken: Callable[[Mapping[str, float]], bool] = lambda alphas: False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = targets
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
        return 7.0 * (1 + distance + distance * self._noise)

    def race(
        self,
        candidates: Sequence[Mapping[str, Smoothing]],
        *,
        incumbent: Tensor | None = None,
        confidence: float = 3.0,
        protected: int = 0,
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
    sites: Sequence[RefinableSite], judge: Bowl, reserve: Bowl, *, trials: int = 16, probes: int = 16, seed: int = 0
) -> RefinementResult:
    ticks = itertools.count()
    return refine(
        sites,
        cast(ModelObjective, judge),
        cast(ModelObjective, reserve),
        settings(trials, seed),
        probes=probes,
        context=StudyContext(clock=lambda: float(next(ticks))),
    )


# ---------------------------------------------------------------------------------------------------------- kinds


def named(*operators: str, loss: float = 0.0) -> RefinableSite:
    return RefinableSite(
        name=operators[0],
        operators=operators,
        rescale=lambda delta: smoothing(0.5),
        choices={"ours": smoothing(0.5)},
        loss=loss,
    )


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
    assert result.deltas == {}
    assert result.reopened == ()
    assert result.before == result.after == pytest.approx(1.0)
    assert result.difference is None
    assert {n: float(s.scales.log()) for n, s in result.smoothings.items()} == pytest.approx(targets)


def test_a_bad_winner_is_reopened_and_replaced() -> None:
    targets = {f"layers.{i}.fc": 0.5 + 0.02 * i for i in range(6)}
    sites = [site(n, a) for n, a in targets.items()]
    sites[2] = site("layers.2.fc", 1.0, single=0.55)
    result = play(sites, Bowl(targets), Bowl(targets, seed=1))
    assert result.accepted
    assert result.reopened[0] == "layers.2.fc"
    assert result.changed["layers.2.fc"] == "best_single"
    assert result.before is not None
    assert result.after is not None
    assert result.difference == pytest.approx(result.before - result.after)
    assert result.standard_error is not None
    assert result.difference is not None
    assert result.difference > result.standard_error > 0
    assert result.after == pytest.approx(Bowl(targets, seed=1).loss(_alphas(result)))


def test_a_kind_that_sits_too_low_is_moved_and_the_other_is_not() -> None:
    targets = {f"layers.{i}.{kind}": 0.7 for i in range(4) for kind in ("up", "down")}
    sites = [site(name, 0.55 if name.endswith("up") else 0.7) for name in targets]
    result = play(sites, Bowl(targets), Bowl(targets, seed=1), probes=0)
    assert result.accepted
    assert result.reopened == ()
    assert 0.05 < result.deltas["up"] <= DELTA_MAX
    assert abs(result.deltas.get("down", 0.0)) < 0.1
    assert all(words.startswith("alphas ") for words in result.changed.values())


def test_the_plain_baseline_of_the_whole_model_can_win() -> None:
    targets = {f"layers.{i}.fc": 0.2 + 0.1 * i for i in range(8)}
    sites = [site(name, 0.9 - target, single=target) for name, target in targets.items()]
    result = play(sites, Bowl(targets), Bowl(targets, seed=1), trials=3, probes=0)
    assert result.accepted
    assert set(result.changed.values()) == {"best_single"}
    assert result.deltas == {}
    assert _alphas(result) == pytest.approx(targets)


def test_no_smoothing_at_all_can_win() -> None:
    targets = {f"layers.{i}.fc": 0.0 for i in range(8)}  # alpha 0 stands for identity here
    sites = [site(name, 0.9 - 0.05 * i, single=0.5) for i, name in enumerate(targets)]
    result = play(sites, Bowl(targets), Bowl(targets, seed=1), trials=4, probes=0)
    assert result.accepted
    assert set(result.changed.values()) == {"identity"}


@pytest.mark.parametrize("seed", range(6))
def test_acceptance_never_raises_the_held_out_loss(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    alphas, search, held_out = torch.rand(3, 5, generator=generator).tolist()
    names = [f"layers.{i}.fc{i % 2}" for i in range(5)]
    judge, reserve = (Bowl(dict(zip(names, t, strict=True)), seed=s) for t, s in ((search, 1), (held_out, 2)))
    sites = [site(n, a, single=s) for n, a, s in zip(names, alphas, search, strict=True)]
    result = play(sites, judge, reserve, seed=seed)
    assert result.before is not None
    assert result.after is not None
    after = reserve.loss(_alphas(result))
    assert after == pytest.approx(result.after, rel=1e-4)
    assert after < result.before if result.accepted else result.after == result.before
    if not result.accepted:
        assert result.changed == {}
        assert _alphas(result) == pytest.approx(dict(zip(names, alphas, strict=True)), abs=1e-6)


def test_a_gain_within_its_standard_error_is_refused() -> None:
    targets = {"a": 0.5, "b": 0.5}
    sites = [site("a", 0.9), site("b", 0.5)]
    noisy = Bowl(targets, seed=3, scatter=200.0)
    result = play(sites, Bowl(targets), noisy)
    assert result.difference is not None
    assert result.standard_error is not None
    assert result.difference < result.standard_error
    assert not result.accepted
    assert "held-out output loss" in result.reason
    single = play(sites, Bowl(targets), Bowl(targets, samples=1))
    assert not single.accepted
    assert single.standard_error is None
    assert "one held-out sample" in single.reason


# ----------------------------------------------------------------------------------------------------- breakdowns


def test_non_finite_candidates_are_failed_trials_with_a_reason() -> None:
    targets = {"layers.0.a": 0.5, "layers.0.b": 0.5}
    sites = [site(name, 0.7, single=0.9) for name in targets]
    judge = Bowl(targets, broken=lambda alphas: max(alphas.values()) > 0.75)
    result = play(sites, judge, Bowl(targets, seed=1))
    failed = [r for r in result.results if r.state == "FAIL"]
    assert failed
    assert all(r.loss is None and "NaN" in r.reason for r in failed)
    assert result.accepted
    assert max(_alphas(result).values()) <= 0.75


def test_a_refinement_whose_trials_all_fail_changes_nothing() -> None:
    targets = {"a": 0.5}
    judge = Bowl(targets, broken=lambda alphas: True)
    result = play([site("a", 0.9)], judge, Bowl(targets))
    assert not result.accepted
    assert result.reason == "every trial failed"
    assert all(r.state == "FAIL" for r in result.results)
    assert result.after == result.before


def test_winners_that_break_the_output_are_replaced() -> None:
    targets = {"a": 0.5, "b": 0.5}

    def broken(alphas: Mapping[str, float]) -> bool:
        return alphas["a"] > 0.89

    result = play([site("a", 0.9), site("b", 0.5)], Bowl(targets, broken=broken), Bowl(targets, broken=broken))
    assert result.accepted
    assert result.before is None
    assert result.after == pytest.approx(1.0, abs=0.1)
    assert result.results[0].state == "FAIL"


def test_a_best_trial_that_breaks_on_held_out_data_is_refused() -> None:
    targets = {"a": 0.5}
    reserve = Bowl(targets, broken=lambda alphas: alphas["a"] < 0.85)
    result = play([site("a", 0.9)], Bowl(targets), reserve)
    assert not result.accepted
    assert "not finite on held-out" in result.reason
    assert result.after == result.before


@pytest.mark.parametrize(
    ("sites", "trials", "field"),
    [
        ([], 16, "sites"),
        ([named("a"), named("a")], 16, "sites"),
        ([named("a")], 0, "trials"),
        ([RefinableSite(name="a", operators=("a",), rescale=smoothing, choices={})], 16, "sites"),
    ],
)
def test_what_cannot_be_refined_is_refused(sites: list[RefinableSite], trials: int, field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}:"):
        play(sites, Bowl({}), Bowl({}), trials=trials)


# -------------------------------------------------------------------------------------------------- order and record


def test_baselines_come_first_and_the_budget_is_kept() -> None:
    targets = {f"layers.{i}.{kind}": 0.6 for i in range(2) for kind in ("up", "down")}
    sites = [site(name, 0.4, single=0.45) for name in targets]
    for trials in (1, 2, 3, 5, 16):
        judge = Bowl(targets)
        result = play(sites, judge, Bowl(targets, seed=1), trials=trials, probes=3)
        assert [r.number for r in result.results] == list(range(trials))
        assert [r.candidate.kind for r in result.results][:3] == ["ours", "best_single", "alpha_0.5"][:trials]
        assert all(r.state == "COMPLETE" for r in result.results[:3])  # baselines are never stopped
        assert judge.evaluations == trials + 3
        assert result.evaluations <= trials + 3 + 2
    assert judge.seen[0] == pytest.approx(dict.fromkeys(targets, 0.4))
    first = judge.seen[4:6]  # after the winners and three probes
    assert first == [pytest.approx(dict.fromkeys(targets, alpha)) for alpha in (0.45, 0.5)]
    sampled = [r.candidate for r in result.results if r.candidate.kind == "sampler"]
    assert sampled
    assert all(change.rest == "ours" for change in sampled)
    assert len({str(change) for change in sampled}) == len(sampled)


def test_a_swap_within_its_scatter_is_not_reopened() -> None:
    targets = {"layers.0.up": 0.5, "layers.0.down": 0.5}
    sites = [site("layers.0.up", 0.9, single=0.6), site("layers.0.down", 0.55, single=0.52)]
    calm, noisy = (play(sites, Bowl(targets, scatter=s), Bowl(targets), trials=3) for s in (0.1, 100.0))
    assert calm.reopened == ("layers.0.up", "layers.0.down")
    assert noisy.reopened == ()


def test_moves_that_change_nothing_take_no_trial() -> None:
    targets = {"layers.0.up": 0.5, "layers.0.down": 0.5}
    stuck = replace(site("layers.0.down", 0.5), rescale=lambda delta: smoothing(0.5))
    result = play([site("layers.0.up", 0.45), stuck], Bowl(targets), Bowl(targets))
    proposals = [r.candidate for r in result.results if r.candidate.kind == "proposal"]
    assert proposals
    assert all(change.deltas["up"] != 0 or "alpha_0.5" in change.choices.values() for change in proposals)


def test_a_seed_repeats_everything_and_another_does_not() -> None:
    targets = {f"layers.{i}.{kind}": 0.6 for i in range(2) for kind in ("up", "down")}
    sites = [site(name, 0.4, single=0.45) for name in targets]
    first, again, other = (
        play(sites, Bowl(targets), Bowl(targets, seed=1), trials=20, seed=seed) for seed in (0, 0, 1)
    )
    assert [r.candidate for r in first.results] == [r.candidate for r in again.results]
    assert (first.after, first.changed, first.deltas) == (again.after, again.changed, again.deltas)
    assert [r.candidate for r in first.results] != [r.candidate for r in other.results]


def test_every_trial_is_an_optuna_trial_with_its_attributes() -> None:
    targets = {f"layers.{i}.fc": 0.5 for i in range(3)}
    sites = [site(n, 0.8, single=0.6) for n in targets]
    storage = optuna.storages.InMemoryStorage()
    heard: list[Trial[Change]] = []
    judge = Bowl(targets, broken=lambda alphas: alphas["layers.1.fc"] < 0.4)
    result = refine(
        sites,
        cast(ModelObjective, judge),
        cast(ModelObjective, Bowl(targets)),
        settings(10),
        probes=16,
        context=StudyContext(log=StoredLog(storage, "refinement"), name="refinement", on_trial=heard.append),
    )
    study = optuna.load_study(study_name="refinement", storage=storage)
    assert result.study_name == "refinement"
    assert tuple(heard) == result.results
    assert study.user_attrs["device"] == "cpu"
    assert set(study.user_attrs["kinds"]["fc"]) == set(targets)
    assert [name for name, *_ in study.user_attrs["reopened"]] == list(result.reopened)
    for trial, found in zip(study.trials, result.results, strict=True):
        assert trial.state.name == found.state
        assert trial.value == found.loss
        assert trial.user_attrs["candidate"] == found.candidate.kind
        assert trial.user_attrs["seconds"] == found.seconds
        assert trial.user_attrs.get("reason", "") == found.reason
    # Every trial has every parameter, so any sampler can learn from all of them.
    assert len({frozenset(trial.params) for trial in study.trials}) == 1


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


def real_site(example: Example, found: Site) -> RefinableSite:
    """A site won by alpha 0.5, or by identity where that is bad."""
    weights = [example.model.get_parameter(o.weight) for o in found.operators]
    columns = [w.abs().amax(1 if o.transposed else 0) for w, o in zip(weights, found.operators, strict=True)]

    def single(alpha: float) -> Smoothing:
        peaks = example.ranges[found.name].peaks()
        return Smoothing(scales=smoothing_scales(peaks, torch.stack(columns).amax(0).detach(), alpha))

    identity = Smoothing(scales=torch.ones(found.channels))
    bad = found.name == BAD
    return RefinableSite(
        name=found.name,
        operators=tuple(o.name for o in found.operators),
        rescale=lambda delta: identity if bad else single(0.5 + delta),
        choices={
            "ours": identity if bad else single(0.5),
            "best_single": single(0.6),
            "alpha_0.5": single(0.5),
            "identity": identity,
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
    first, again = (refine(sites, judge, reserve, settings(8, seed=3), probes=6) for _ in range(2))
    assert first.accepted
    assert first.reopened[0] == BAD
    assert BAD in first.changed
    assert first.before is not None
    assert first.after is not None
    assert first.after == pytest.approx(reserve.loss(first.smoothings))
    assert first.after < first.before / 2
    assert first.before == pytest.approx(reserve.loss({s.name: s.choices["ours"] for s in sites}))
    assert [r.candidate for r in again.results] == [r.candidate for r in first.results]
    assert again.after == first.after
    assert first.kinds == {"q,k": ("q",), "down": ("down",), "out": ("out",), "head": ("head",)}


def test_a_task_metric_cannot_be_refined() -> None:
    example = loud_block()
    candidate = CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme())
    objective = ModelObjective(candidate, random_batches(1), loss=lambda model, batches: 1.0)
    with pytest.raises(InputError, match="task metric"):
        refine([real_site(example, found) for found in example.sites], objective, objective, SearchConfig())
    assert objective.evaluations == 0


def _alphas(result: RefinementResult) -> dict[str, float]:
    return {name: float(s.scales.log()) for name, s in result.smoothings.items()}


def test_a_refinement_cut_anywhere_goes_on_as_if_nothing_had_happened() -> None:
    targets = {f"layers.{i}.fc": 0.5 for i in range(3)}
    sites = [site(n, 0.8, single=0.6) for n in targets]

    def refined(log: StoredLog | None, judge: Bowl, stop: Callable[[], bool] = never) -> RefinementResult:
        return refine(
            sites,
            cast(ModelObjective, judge),
            cast(ModelObjective, Bowl(targets)),
            settings(10),
            probes=16,
            context=StudyContext(log=log, name="refinement", stop=stop),
        )

    undisturbed, whole = refined(None, judge := Bowl(targets)), judge.evaluations
    for cut in range(1, 10):
        storage = optuna.storages.InMemoryStorage()
        asked = iter(range(1000))
        with contextlib.suppress(Interrupted):
            refined(StoredLog(storage, "refinement"), Bowl(targets), stop=lambda: next(asked) > cut)  # noqa: B023
        log = StoredLog(storage, "refinement")
        known = len(log.past.trials)
        again = refined(log, judge := Bowl(targets))
        assert [(r.candidate, r.loss, r.state) for r in again.results] == [
            (r.candidate, r.loss, r.state) for r in undisturbed.results
        ]
        assert (again.accepted, again.after, again.changed) == (
            undisturbed.accepted,
            undisturbed.after,
            undisturbed.changed,
        )
        assert known <= 2 or judge.evaluations < whole, "what is on record is not scored again"
        assert len(storage.get_all_trials(0)) == len(again.results)


def test_where_the_record_differs_from_the_replay_it_counts_as_it_is() -> None:
    targets = {f"layers.{i}.{kind}": 0.6 for i in range(2) for kind in ("up", "down")}
    sites = [site(name, 0.4, single=0.45) for name in targets]
    storage = optuna.storages.InMemoryStorage()
    heard: list[Trial[Change]] = []

    def refined(trials: int, seed: int, judge: Bowl) -> RefinementResult:
        context = StudyContext(log=StoredLog(storage, "refinement"), name="refinement", on_trial=heard.append)
        model, reserve = cast(ModelObjective, judge), cast(ModelObjective, Bowl(targets))
        return refine(sites, model, reserve, settings(trials, seed), probes=0, context=context)

    before = refined(14, 0, Bowl(targets))
    heard.clear()
    after = refined(17, 1, judge := Bowl(targets))  # another seed, as another library version would be
    assert after.results[:14] == before.results
    assert [r.number for r in after.results] == list(range(17))
    assert tuple(heard) == after.results
    assert judge.evaluations == 1 + 1 + 3, "the winners, the best one on record, and what is new"

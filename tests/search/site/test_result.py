"""What a search found comes back from tensors equal to the bit; candidates from JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import CandidateKind
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search import search_site
from alphasmith.search.site.result import SiteResult, candidate_json, candidate_of, result_from_state, result_state
from alphasmith.search.study.alpha_ranges import AlphaRange
from alphasmith.search.study.candidates import BASELINES, Candidate, TrialResult
from alphasmith.search.study.guard import Overruled
from alphasmith.search.study.space import SearchSpace
from alphasmith.storage.runs.entries import Losses, NoiseFacts, SearchFacts
from tests.support.equality import same

CHANNELS = 4

floats = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=8)


def several(of: st.SearchStrategy[object], least: int = 0) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(of, min_size=least, max_size=3).map(tuple)


def vectors(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    values = st.integers(0, 9) if dtype == torch.int64 else floats
    return st.lists(values, min_size=CHANNELS, max_size=CHANNELS).map(lambda v: torch.tensor(v, dtype=dtype))


candidates = st.builds(
    Candidate,
    kind=st.sampled_from(get_args(CandidateKind)),
    alphas=several(floats, 1),
    betas=several(floats),
    offsets=several(floats),
    shift=st.sampled_from(["none", "middle"]),
    range=st.sampled_from(["absmax", "percentile"]),
    grouping=words,
    statistic=words,
) | st.sampled_from([Candidate("identity", None), Candidate("refined", None)])
smoothings = st.builds(
    Smoothing, scales=vectors(torch.float32), shift=st.none() | vectors(torch.float32), range_factor=floats
)
errors = floats.map(abs)
losses = st.builds(
    Losses,
    identity=st.none() | errors,
    alpha_half=st.none() | errors,
    best_single=st.none() | errors,
    best_single_alpha=floats,
    ours=errors,
    limit=st.none() | errors,
)
trials = st.builds(TrialResult, number=st.integers(0, 2**40), candidate=candidates, state=st.just("COMPLETE"), loss=floats,
                   seconds=floats) | st.builds(
    TrialResult, number=st.integers(0, 9), candidate=candidates, state=st.sampled_from(["FAIL", "PRUNED"]),
    loss=st.none(), seconds=floats, reason=words)  # fmt: skip
noise = st.builds(
    NoiseFacts,
    median_log_ratio=floats,
    kendall_tau=st.none() | floats,
    proposals=st.integers(0, 9),
    seconds=errors,
    evaluations_saved=st.integers(-9, 9),
    seconds_saved=floats,
)
facts = st.builds(
    SearchFacts,
    stopped=words,
    noise_model=st.none() | noise,
    noise_reason=words,
    k_tried=several(st.integers(1, 9)),
    range_losses=st.dictionaries(words, errors, max_size=3),
)
spaces = st.builds(
    SearchSpace,
    floats=several(st.tuples(words, floats, floats)),
    choices=several(st.tuples(words, several(words))),
    recorded=several(st.tuples(words, several(words))),
)
results = st.builds(
    SiteResult,
    name=words,
    labels=vectors(torch.int64),
    ranges=several(st.builds(AlphaRange, low=floats, high=floats, position=floats, explanation=words)),
    magnitudes=several(floats),
    outliers=several(st.booleans()),
    requested_k=st.integers(1, 9),
    candidate=candidates,
    smoothing=smoothings,
    grouping=words,
    statistic=words,
    plain=st.fixed_dictionaries(dict.fromkeys(BASELINES, smoothings)),
    slopes=vectors(torch.float64),
    search=losses,
    held_out=losses,
    overruled=st.none()
    | st.builds(
        Overruled,
        proposed=st.integers(0, 99),
        proposed_kind=st.sampled_from(get_args(CandidateKind)),
        proposed_loss=st.none() | floats,
        kept=st.integers(0, 99),
        kept_kind=st.sampled_from(get_args(CandidateKind)),
        kept_loss=floats,
    ),
    results=several(trials),
    exact_evaluations=st.integers(0, 2**40),
    seconds=floats,
    study_name=words,
    facts=facts,
    trace=several(st.tuples(floats, floats)),
    space=spaces,
)


@settings(deadline=None, max_examples=25)
@given(result=results)
def test_any_result_comes_back_equal_to_the_bit(result: SiteResult) -> None:
    assert same(result_from_state(result_state(result)), result)


@pytest.mark.parametrize("loud", [False, True])
def test_the_result_of_a_search_survives_a_file(loud: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 8, generator=generator), torch.randn(6, 8, generator=generator)
    x[:, 3] *= 40.0 if loud else 1.0
    found = search_site(x, w, scheme=Scheme(), groups=2, trials=6)
    save_file(result_state(found), tmp_path / "result.safetensors")
    read = result_from_state(load_file(tmp_path / "result.safetensors"))
    assert same(read, found)
    assert read.trials.equals(found.trials)
    assert read.space.digest() == found.space.digest()


def test_a_winner_that_is_a_baseline_may_share_its_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    found = search_site(torch.randn(64, 8, generator=generator), torch.eye(8), scheme=Scheme(), groups=1, trials=3)
    shared = type(found)(
        **{**vars(found), "smoothing": found.plain["identity"], "candidate": Candidate("identity", None)}
    )
    save_file(result_state(shared), tmp_path / "result.safetensors")  # refuses tensors that share memory
    read = result_from_state(load_file(tmp_path / "result.safetensors"))
    assert same(read, shared)
    assert read.alphas is None


def test_another_version_or_a_damaged_result_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    found = search_site(torch.randn(64, 8, generator=generator), torch.eye(8), scheme=Scheme(), groups=1, trials=3)
    state = result_state(found)
    text = bytes(state["structure"].tolist())
    newer = torch.tensor(list(text.replace(b'"version":3', b'"version":9')), dtype=torch.uint8)
    with pytest.raises(InputError, match="has version 9, not 3; search the site again"):
        result_from_state({**state, "structure": newer})
    with pytest.raises(InputError, match="site result: is incomplete"):
        result_from_state({name: value for name, value in state.items() if name != "slopes"})


@settings(deadline=None, max_examples=60)
@given(candidate=candidates)
def test_candidates_survive_json(candidate: Candidate) -> None:
    assert same(candidate_of(json.loads(json.dumps(candidate_json(candidate)))), candidate)


def test_whole_numbers_of_a_database_are_numbers_again() -> None:
    found = candidate_of({"kind": "sampler", "params": {"alpha_0": 1, "alpha_1": 0.5}})
    assert same(found, Candidate("sampler", (1.0, 0.5)))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"kind": "sampler"},
        {"kind": "guess", "params": {"alpha_0": 0.5}},
        {"kind": "sampler", "params": {"alpha_1": 0.5}},
        {"kind": "sampler", "params": {"alpha_0": "much"}},
        {"kind": "sampler", "params": {"alpha_0": 0.5, "shift": "sideways"}},
        {"kind": "sampler", "params": [0.5]},
    ],
)
def test_what_is_no_candidate_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(InputError, match="candidate: a recorded candidate cannot be read"):
        candidate_of(value)

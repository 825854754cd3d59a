"""Several smoothings predicted by the same backward passes: as each alone, near what is measured, within memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import pytest

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sensitivity.output_shares import output_shares
from alphasmith.objectives.sensitivity.rival_contributions import rival_contributions
from tests.support.quantized_models import Example, block_example, pixels_example, shifted

EXAMPLES = [block_example(), shifted(block_example()), pixels_example(), shifted(pixels_example())]


def candidate_of(example: Example) -> CandidateModel:
    return CandidateModel(copy.deepcopy(example.model), example.sites, example.ranges, Scheme())


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_rivals_are_predicted_together_as_each_alone(example: Example, loss: Literal["mse", "kl"]) -> None:
    first = example.smoothings
    changed = next(iter(first))
    wider = replace(first[changed], range_factor=3 * first[changed].range_factor)
    rivals = [first, {**first, changed: wider}, first]
    candidate = candidate_of(example)
    found = rival_contributions(candidate, rivals, example.batches, loss=loss, seed=5)
    candidate.check_pristine()
    for rival, of_sites in zip(rivals, found, strict=True):
        (alone,) = rival_contributions(candidate, [rival], example.batches, loss=loss, seed=5)
        assert of_sites == pytest.approx(alone, rel=1e-5)
    assert found[0] == found[2]
    assert found[1][changed] > found[0][changed], "a wider range has coarser steps"
    assert {n: v for n, v in found[1].items() if n != changed} == {n: v for n, v in found[0].items() if n != changed}
    measured = output_shares(candidate, first, example.batches, loss=loss, projections=1, measured=99).sites
    assert set(found[0]) == set(measured)
    # Errors of weights, which rows share, do add up where the output is a mean over them.
    assert all(1 / 5 < found[0][name] / (share.measured or 0) < 5 for name, share in measured.items())


def test_rivals_for_which_there_is_no_memory_are_unknown() -> None:
    example = block_example()
    others = [{n: replace(s, range_factor=f) for n, s in example.smoothings.items()} for f in (1.0, 2.0, 3.0)]
    candidate = candidate_of(example)
    counts = [
        sum(bool(of_site) for of_site in rival_contributions(candidate, others, example.batches, memory=size))
        for size in range(0, 40_000, 1_000)
    ]
    assert sorted(set(counts)) == [0, 1, 3], "none, the first alone, or all"
    assert counts == sorted(counts)


def test_no_data_is_named() -> None:
    with pytest.raises(InputError, match=r"^batches:"):
        rival_contributions(candidate_of(block_example()), [{}], [])

"""Branch and residual: what they are equal to, what makes them better, what they take, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.groups import group_channels
from alphasmith.objectives.joint.branch.encoding import branch_layer, output_error
from alphasmith.objectives.joint.branch.rows import LayerRows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.branch.stored import restore_branch, stored_size
from alphasmith.objectives.joint.codebook.tensors import CodebookSettings, decode_weight, encode_weight
from alphasmith.objectives.joint.low_rank.decomposition import decompose
from alphasmith.objectives.quantization.quantizers import (
    activation_scale,
    dequantize_weight,
    fake_quantize_activation,
    quantize_weight,
)
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import group_scales, smoothing_scales
from tests.support.joint_branches import channels_apart, low_rank_under_noise
from tests.support.site_cases import relaxed

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = low_rank_under_noise(24, 32, 4, 0.2, GENERATOR)
ROWS = channels_apart(64, 32, GENERATOR)
PLAIN = BranchSettings(alpha=None, rank=0)

forms = st.one_of(
    st.fixed_dictionaries({"residual": st.sampled_from(["int4", "int8"]), "group_size": st.sampled_from([None, 2, 5])}),
    st.fixed_dictionaries(
        {"residual": st.just("codebook"), "k": st.integers(2, 40), "channels": st.sampled_from([None, 1, 3])}
    ),
)
inputs = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([None, 0.0, 0.3, 0.5, (0.2, 0.8)]),
        "branch_bits": st.sampled_from([8, 16]),
        "activation_bits": st.sampled_from([None, 4, 8]),
        "activation_granularity": st.sampled_from(["static", "token"]),
        "refits": st.integers(0, 2),
    }
)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().square().sum() / wanted.double().square().sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["static", "token"])
def test_without_rank_and_alpha_it_is_plain_quantization(bits: Any, granularity: Any) -> None:
    scheme = Scheme(weights="int4" if bits == 4 else "int8", activation_granularity=granularity)
    settings = replace(PLAIN, residual="int4" if bits == 4 else "int8", activation_granularity=granularity)
    made = branch_layer(WEIGHT, ROWS, settings)
    coded = quantize_weight(WEIGHT, scheme)
    absmax = ROWS.abs().max() if granularity == "static" else ROWS.abs().amax(1, keepdim=True)
    x = fake_quantize_activation(ROWS, activation_scale(absmax, "int8"), "int8")
    found = x @ dequantize_weight(coded, scheme).t()
    assert made.error == pytest.approx(relative(found, ROWS @ WEIGHT.t()), rel=1e-4)
    assert torch.equal(made.parts.residual, dequantize_weight(coded, scheme))
    assert "left" not in made.tensors


def test_without_rank_and_alpha_and_with_a_codebook_it_is_that_codebook() -> None:
    settings = replace(PLAIN, residual="codebook", k=16, activation_bits=None)
    made = branch_layer(WEIGHT, ROWS, settings)
    stored = encode_weight(WEIGHT, CodebookSettings(k=16))
    assert torch.equal(made.parts.residual, decode_weight("weight", stored.entry, stored.tensors))
    assert made.stored_bytes == stored.stored_bytes


def test_the_branch_is_the_best_of_its_rank_of_the_smoothed_weight() -> None:
    made = branch_layer(WEIGHT, ROWS, BranchSettings(alpha=0.5, rank=3, residual="int8", activation_bits=None))
    scales = smoothing_scales(ROWS.abs().amax(0), WEIGHT.abs().amax(0), 0.5)
    parts = made.parts
    assert parts.left is not None
    assert parts.right is not None
    assert parts.smooth is not None
    torch.testing.assert_close(parts.smooth, scales)
    best = decompose(WEIGHT * scales, rank=3)
    torch.testing.assert_close(parts.left @ parts.right, best.left @ best.right, rtol=2e-3, atol=2e-3)


@relaxed
@given(forms, inputs, st.integers(0, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_what_is_stored_comes_back_and_takes_the_bytes_it_says(
    form: dict[str, Any], given: dict[str, Any], rank: int, outputs: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=generator)
    rows = channels_apart(9, columns, generator)
    settings = BranchSettings(**form, **given, rank=rank)
    if rank > (outputs * columns - 1) // (outputs + columns):
        with pytest.raises(InputError, match=r"^branch\.rank: "):
            branch_layer(weight, rows, settings)
        return
    made = branch_layer(weight, rows, settings)
    assert made.stored_bytes == sum(tensor.nbytes for tensor in made.tensors.values())
    size = stored_size(weight.shape, settings)
    assert made.stored_bytes <= size
    if made.entry.codebook is None or made.tensors["residual_table"].numel() == settings.k * len(
        made.tensors["residual_sizes"]
    ):
        assert made.stored_bytes == size
    assert made.error == min(made.rounds)
    # As JSON and as copied memory.
    entry = type(made.entry).model_validate_json(made.entry.model_dump_json())
    parts = restore_branch("w", entry.model_dump(mode="json"), {k: v.clone() for k, v in made.tensors.items()})
    for name, value in vars(made.parts).items():
        other = getattr(parts, name)
        assert value is other is None or torch.equal(value, other), name
    assert output_error(made, weight, rows) == pytest.approx(made.error, rel=1e-6, abs=1e-12)
    again = branch_layer(weight, rows, settings)
    assert again.entry == made.entry
    assert again.rounds == made.rounds


@relaxed
@given(forms, inputs, st.integers(1, 4), st.integers(0, 99))
def test_a_refit_is_never_worse_than_its_start(
    form: dict[str, Any], given: dict[str, Any], rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, rows = torch.randn(12, 16, generator=generator), channels_apart(24, 16, generator)
    start = branch_layer(weight, rows, BranchSettings(**form, **(given | {"refits": 0}), rank=rank))
    refitted = branch_layer(weight, rows, BranchSettings(**form, **(given | {"refits": 4}), rank=rank))
    assert refitted.rounds[0] == start.error
    assert refitted.error <= start.error
    # It ends with the first round that is no better.
    assert all(after < before for before, after in zip(refitted.rounds, refitted.rounds[1:-1], strict=False))
    assert len(refitted.rounds) == 5 or refitted.rounds[-1] >= refitted.error


def test_refits_lower_the_error_where_the_residual_is_coarse() -> None:
    settings = BranchSettings(alpha=None, rank=8, residual="codebook", k=4, activation_bits=None)
    start, refitted = (branch_layer(WEIGHT, ROWS, replace(settings, refits=n)) for n in (0, 8))
    assert refitted.error < 0.99 * start.error


@pytest.mark.parametrize("form", [{"residual": "int4"}, {"residual": "codebook", "k": 16}])
def test_the_error_falls_with_the_rank_of_a_matrix_of_low_rank(form: dict[str, Any]) -> None:
    weight = low_rank_under_noise(48, 40, 6, 0.01, GENERATOR)
    rows = torch.randn(100, 40, generator=GENERATOR)
    errors = [
        branch_layer(weight, rows, BranchSettings(alpha=None, rank=rank, activation_bits=None, **form)).error
        for rank in (0, 2, 4, 6)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.01 * errors[0], "what is left after the sixth is noise"


def test_smoothing_and_a_branch_each_help_where_few_channels_are_large() -> None:
    plain = BranchSettings(alpha=None, rank=0, residual="int4", activation_bits=4)
    errors = {
        (alpha, rank): branch_layer(WEIGHT, ROWS, replace(plain, alpha=alpha, rank=rank)).error
        for alpha in (None, 0.8)
        for rank in (0, 4)
    }
    assert errors[0.8, 0] < errors[None, 0]
    assert errors[None, 4] < errors[None, 0]
    assert errors[0.8, 4] < min(errors[0.8, 0], errors[None, 4])


@pytest.mark.parametrize("form", [{"residual": "int4"}, {"residual": "int8"}, {"residual": "codebook"}])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
def test_a_change_of_all_units_changes_nothing_but_units(form: dict[str, Any], alpha: float | None) -> None:
    settings = BranchSettings(alpha=alpha, rank=3, **form)
    before = branch_layer(WEIGHT, ROWS, settings)
    # Powers of two round nothing.
    after = branch_layer(WEIGHT * 2**4, ROWS * 2**-6, settings)
    assert after.error == pytest.approx(before.error, rel=1e-3)


def test_a_change_of_a_channels_unit_is_taken_up_by_its_scale() -> None:
    """With s = a the smoothed input, and so everything behind it, does not see in which unit a channel came."""
    settings = BranchSettings(alpha=(1.0), rank=3, residual="int4")
    units = 2.0 ** torch.randint(-3, 4, (32,), generator=GENERATOR)
    weight = WEIGHT / WEIGHT.abs().amax(0)
    before = branch_layer(weight, ROWS, settings)
    after = branch_layer(weight / units, ROWS * units, settings)
    parts, others = before.parts, after.parts
    assert parts.smooth is not None
    assert others.smooth is not None
    torch.testing.assert_close(others.smooth, parts.smooth * units)
    assert after.error == pytest.approx(before.error, rel=1e-3)


def test_every_group_has_its_alpha() -> None:
    peaks, columns = ROWS.abs().amax(0), WEIGHT.abs().amax(0)
    grouping = group_channels(peaks, method="kmeans", k=3)
    alphas = (0.2, 0.5, 0.9)
    made = branch_layer(WEIGHT, ROWS, BranchSettings(alpha=alphas, rank=2))
    torch.testing.assert_close(made.tensors["smooth"], group_scales(peaks, columns, alphas, grouping.labels))
    equal = branch_layer(WEIGHT, ROWS, BranchSettings(alpha=(0.4, 0.4, 0.4), rank=2))
    single = branch_layer(WEIGHT, ROWS, BranchSettings(alpha=0.4, rank=2))
    torch.testing.assert_close(equal.tensors["smooth"], single.tensors["smooth"])
    assert equal.error == pytest.approx(single.error, rel=1e-4)
    few = branch_layer(WEIGHT[:, :2], ROWS[:, :2].sign(), BranchSettings(alpha=alphas, rank=1))
    assert few.notes == ("weight: its channels make 1 group, the first alphas count",)


def test_dead_channels_say_nothing() -> None:
    """Channels without activation or without weight get the house's neutral scale and leave the others as they are."""
    weight, rows = WEIGHT.clone(), ROWS.clone()
    weight[:, 3] = 0
    rows[:, 7] = 0
    settings = BranchSettings(alpha=0.5, rank=4, residual="int8")
    made = branch_layer(weight, rows, settings)
    scales = made.tensors["smooth"]
    live = [i for i in range(32) if i not in (3, 7)]
    assert float(scales.min()) >= float(scales[live].min()) / 1.001
    assert math.isfinite(made.error)
    smaller = branch_layer(weight[:, live], rows[:, live], settings)
    torch.testing.assert_close(smaller.tensors["smooth"], scales[live])
    assert made.error < 2 * smaller.error


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("form", [{"residual": "int4"}, {"residual": "codebook"}])
def test_zero_and_singular_matrices(rank: int, form: dict[str, Any]) -> None:
    settings = BranchSettings(alpha=0.5, rank=rank, refits=2, **form)
    nothing = branch_layer(torch.zeros(8, 12), ROWS[:, :12], settings)
    assert nothing.error == 0.0
    assert not nothing.parts.smoothed_weight().any()
    single = branch_layer(torch.ones(8, 12), ROWS[:, :12], replace(settings, activation_bits=None))
    assert single.error < 1e-2


def test_sampled_peaks_set_the_range() -> None:
    wide = branch_layer(WEIGHT, LayerRows(x=ROWS, peaks=ROWS.abs().amax(0) * 8), replace(PLAIN, residual="int8"))
    narrow = branch_layer(WEIGHT, ROWS, replace(PLAIN, residual="int8"))
    assert float(wide.tensors["input_scale"]) == pytest.approx(8 * float(narrow.tensors["input_scale"]))
    assert wide.error > 4 * narrow.error


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"alpha": math.nan}, "branch.alpha"),
        ({"alpha": ()}, "branch.alpha"),
        ({"rank": -1}, "branch.rank"),
        ({"rank": 14}, "branch.rank"),
        ({"branch_bits": 4}, "branch.bits"),
        ({"residual": "int2"}, "branch.residual"),
        ({"k": 1}, "branch.k"),
        ({"k": 65537}, "branch.k"),
        ({"group_size": 1}, "branch.group_size"),
        ({"channels": 0}, "branch.channels"),
        ({"activation_bits": 16}, "branch.activation_bits"),
        ({"activation_granularity": "tensor"}, "branch.activation_granularity"),
        ({"group_method": "sorted"}, "branch.group_method"),
        ({"refits": -1}, "branch.refits"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        branch_layer(WEIGHT, ROWS, replace(PLAIN, **change))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        (WEIGHT, ROWS[:, :5]),
        (WEIGHT, ROWS[:0]),
        (WEIGHT[0], ROWS),
        (WEIGHT.long(), ROWS),
        (WEIGHT, LayerRows(x=ROWS, peaks=torch.ones(3))),
        (WEIGHT, LayerRows(x=ROWS, sample_peaks=torch.ones(3, 32))),
    ],
)
def test_rows_that_do_not_fit_are_named(given: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"^fc: "):
        branch_layer(*given, PLAIN, name="fc")


def test_what_is_not_finite_is_refused() -> None:
    for place in (0, 1):
        tensors = [WEIGHT.clone(), ROWS.clone()]
        tensors[place][1, 2] = math.inf
        with pytest.raises(NonFiniteError, match=r"^fc: "):
            branch_layer(tensors[0], tensors[1], PLAIN, name="fc")
        made = branch_layer(WEIGHT, ROWS, PLAIN)
        with pytest.raises(NonFiniteError):
            output_error(made, tensors[0], tensors[1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry, tensors: tensors.pop("left"),
        lambda entry, tensors: tensors.update(left=tensors["left"][:, 1:]),
        lambda entry, tensors: tensors.update(left=tensors["left"].float()),
        lambda entry, tensors: tensors.update(left=tensors["left"] * 2),
        lambda entry, tensors: tensors.update(more=tensors["left"]),
        lambda entry, tensors: tensors.pop("residual_table"),
        lambda entry, tensors: tensors.update(residual_table=tensors["residual_table"] + 1),
        lambda entry, tensors: entry.update(rank=2),
        lambda entry, tensors: entry.update(rank="3"),
        lambda entry, tensors: entry.update(digest="0"),
        lambda entry, tensors: entry.update(residual="int4"),
        lambda entry, tensors: entry.update(codebook=None),
        lambda entry, tensors: entry.update(shape=[32, 24]),
        lambda entry, tensors: entry.update(more=1),
        lambda entry, tensors: entry["codebook"].update(bits=5),
    ],
)
def test_what_was_spoilt_is_refused_in_one_line(spoil: Any) -> None:
    made = branch_layer(WEIGHT, ROWS, BranchSettings(rank=3, residual="codebook"))
    entry, tensors = made.entry.model_dump(mode="json"), dict(made.tensors)
    restore_branch("fc", entry, tensors)
    spoil(entry, tensors)
    with pytest.raises(InputError, match=r"^fc: .*; export the model again") as caught:
        restore_branch("fc", entry, tensors)
    assert "\n" not in str(caught.value)

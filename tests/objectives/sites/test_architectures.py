"""Every architecture: what is folded or multiplied leaves the float outputs unchanged, and the expected sites are found."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from alphasmith.objectives.media.batch import Batch, call
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.sites.types import Discovery, Site
from tests.support.architecture_records import Architecture, Folded, Kept, tokens
from tests.support.architecture_text import mixtral
from tests.support.architectures import ARCHITECTURES
from tests.support.smoothing_checks import TOLERANCE, apply, difference, draw, evaluate

#: Sites whose shift goes into biases: those read by operators with a bias behind a normalization or operator with one.
SHIFTS_FOLDED = {
    "opt": 4, "gpt2": 4, "gpt-neox": 4, "bloom": 4, "bert": 1, "ernie": 1, "vit": 5, "swin": 4, "whisper": 6, "convnext": 5,
    "wav2vec2": 1, "torch-encoder-pre-norm": 3, "torch-encoder-post-norm": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture, traced once.

    Attributes:
        architecture: What is expected of it.
        model: Pristine model; tests fold copies.
        traced: The batch discovery saw.
        fresh: Other input, of another batch size.
        found: Its discovery.
        outputs: Floating outputs of the pristine model on ``fresh``.
    """

    architecture: Architecture
    model: nn.Module
    traced: Batch
    fresh: Batch
    found: Discovery
    outputs: tuple[torch.Tensor, ...]


def smoothed(case: Case, sites: list[Site], change: Callable[[Site], Site] = lambda site: site) -> float:
    """Relative difference of the outputs after smoothing ``sites`` of a copy with random scales."""
    model = copy.deepcopy(case.model)
    for index, site in enumerate(sites):
        apply(model, change(site), draw(site, index))
    return difference(evaluate(model, case.fresh), case.outputs)


def matrices(model: nn.Module, batch: Batch) -> set[str]:
    """Names of the linear and convolution modules whose own forward ran."""
    called: set[str] = set()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    ]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return called


def expand(expectation: Folded | Kept) -> list[tuple[str, ...]]:
    return [tuple(name.replace("{n}", str(n)) for name in expectation.operators) for n in range(expectation.repeat)]


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda a: a.name)
def case(request: pytest.FixtureRequest) -> Case:
    architecture: Architecture = request.param
    model = architecture.factory()
    traced = architecture.batch(torch.Generator().manual_seed(1), 2)
    fresh = architecture.batch(torch.Generator().manual_seed(2), 3)
    return Case(
        architecture=architecture,
        model=model,
        traced=traced,
        fresh=fresh,
        found=discover(model, traced),
        outputs=evaluate(model, fresh),
    )


def test_every_operator_is_in_one_site_or_skipped(case: Case) -> None:
    counts = Counter(operator.name for site in case.found.sites for operator in site.operators)
    skipped = dict(case.found.skipped)
    assert set(counts.values()) <= {1}
    assert matrices(case.model, case.traced) <= set(counts) | set(skipped)
    owned = {operator.name for site in case.found.sites for operator in site.operators if not operator.raw}
    assert not owned & set(skipped)
    assert all(reason for reason in skipped.values())
    for name in case.architecture.skipped:
        assert name in skipped


def test_sites_are_well_formed(case: Case) -> None:
    names = [site.name for site in case.found.sites]
    assert len(set(names)) == len(names)
    tensors = {**dict(case.model.named_parameters(remove_duplicate=False)), **dict(case.model.named_buffers())}
    for site in case.found.sites:
        assert site.name == site.operators[0].name
        assert site.ties.shape == (site.channels,)
        assert (site.mode == "fold") == (site.reason == "")
        assert (site.mode == "fold") == bool(site.producers)
        for operator in site.operators:
            weight = tensors[operator.weight]
            assert operator.in_channels == site.channels
            assert not (site.mode == "explicit" and operator.raw)
            if operator.raw:
                continue
            if operator.kind == "conv":
                expected = (operator.out_channels, operator.in_channels // operator.groups, *operator.kernel)
            elif operator.transposed:
                expected = (operator.in_channels, operator.out_channels)
            else:
                expected = (operator.out_channels, operator.in_channels)
            assert weight.shape == expected
            assert operator.bias is None or tensors[operator.bias].shape == (operator.out_channels,)
        for edit in site.edits:
            assert edit.channel.expand(tensors[edit.parameter].shape).shape == tensors[edit.parameter].shape
            assert int(edit.channel.max()) < site.channels
        if site.shift_edits:
            assert site.mode == "fold"
            assert site.shiftable
            assert {edit.weight for edit in site.shift_edits if edit.weight} == {op.weight for op in site.operators}
            assert len({edit.parameter for edit in site.shift_edits}) == len(site.shift_edits)


def test_expected_sites_fold(case: Case) -> None:
    found = {tuple(operator.name for operator in site.operators): site for site in case.found.sites}
    by_set = {frozenset(names): site for names, site in found.items()}
    for expectation in case.architecture.folded:
        for n, operators in enumerate(expand(expectation)):
            assert frozenset(operators) in by_set, f"{operators} do not share a site of their own: {sorted(found)}"
            site = by_set[frozenset(operators)]
            assert site.mode == "fold", f"{site.name}: {site.reason}"
            assert {name.replace("{n}", str(n)) for name in expectation.producers} <= set(site.producers)
            scales = len(torch.unique(site.ties))
            assert scales == (site.channels if expectation.tied is None else expectation.tied)


def test_expected_sites_are_kept(case: Case) -> None:
    by_set = {frozenset(operator.name for operator in site.operators): site for site in case.found.sites}
    for expectation in case.architecture.kept:
        for operators in expand(expectation):
            assert frozenset(operators) in by_set
            site = by_set[frozenset(operators)]
            assert site.mode == expectation.mode
            assert site.reason


@pytest.mark.parametrize("modes", [("fold",), ("fold", "explicit")], ids=["folds", "all"])
def test_smoothed_sites_leave_the_outputs_unchanged(case: Case, modes: tuple[str, ...]) -> None:
    """Scales are independent between sites, so errors of two sites cannot cancel; a failure lists the sites at fault."""
    sites = [site for site in case.found.sites if site.mode in modes]
    assert any(site.mode == "fold" for site in sites)
    if not smoothed(case, sites) <= TOLERANCE:
        alone = {f"{site.name} ({site.mode})": smoothed(case, [site]) for site in sites}
        pytest.fail(f"errors of each site alone: { {name: e for name, e in alone.items() if not e <= TOLERANCE} }")


def test_each_half_of_a_folded_shift_changes_the_outputs(case: Case) -> None:
    """Negative control: neither the producers' nor the consumers' biases may be left out."""

    def producers(site: Site) -> Site:
        return replace(site, shift_edits=tuple(edit for edit in site.shift_edits if not edit.weight))

    def consumers(site: Site) -> Site:
        return replace(site, shift_edits=tuple(edit for edit in site.shift_edits if edit.weight))

    for site in case.found.sites:
        if site.shift_edits:
            assert smoothed(case, [site], producers) > 1e-6, site.name
            assert smoothed(case, [site], consumers) > 1e-6, site.name


def test_shifts_fold_where_biases_can_take_them(case: Case) -> None:
    folded = sum(bool(site.shift_edits) for site in case.found.sites)
    assert folded == SHIFTS_FOLDED.get(case.architecture.name, 0)


def test_folding_producers_only_changes_the_outputs(case: Case) -> None:
    """Negative control: each site's edits matter, so the tests above can fail."""

    def halve(site: Site) -> Site:
        return replace(site, edits=tuple(edit for edit in site.edits if edit.power == -1))

    for site in case.found.sites:
        if site.mode == "fold":
            assert smoothed(case, [replace(site, shift_edits=())], halve) > 1e-6, site.name


def test_discovery_is_deterministic_and_leaves_the_model_alone(case: Case) -> None:
    model = copy.deepcopy(case.model)
    again = discover(model, case.fresh)
    assert [(s.name, s.mode, s.reason, s.producers) for s in again.sites] == [
        (s.name, s.mode, s.reason, s.producers) for s in case.found.sites
    ]
    assert all(torch.equal(a.ties, b.ties) for a, b in zip(again.sites, case.found.sites, strict=True))
    before = case.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(("experts", "samples"), [(3, 2), (16, 1)])
def test_experts_never_break_a_fold(implementation: str, experts: int, samples: int) -> None:
    """With 16 experts and one traced sample most experts see no token, yet they read the same tensor."""
    model = mixtral(experts, 2)()
    # Grouped products exist in float32 only: whatever was traced is folded into the float64 model.
    traced = mixtral(experts, 2, implementation)().float()
    batch = tokens(torch.Generator().manual_seed(1), samples)
    fresh = tokens(torch.Generator().manual_seed(2), 8)
    for allowed in (False, True):
        mixed = copy.deepcopy(model)
        for index, site in enumerate(discover(traced, batch, experts=allowed).sites):
            if site.mode == "fold":
                fold(mixed, site, draw(site, index))
        assert difference(evaluate(mixed, fresh), evaluate(model, fresh)) <= TOLERANCE


@pytest.mark.parametrize("norm", ["model.layers.0.post_attention_layernorm", "model.layers.1.post_attention_layernorm"])
def test_expert_inputs_fold_into_their_norm_only_when_asked(norm: str) -> None:
    model = mixtral(3, 2)()
    batch = tokens(torch.Generator().manual_seed(1), 2)

    def folded(experts: bool) -> bool:
        return any(norm in site.producers for site in discover(model, batch, experts=experts).sites)

    assert not folded(experts=False)
    assert folded(experts=True)


def test_excluded_operators_are_left() -> None:
    model = ARCHITECTURES[0].factory()
    batch = ARCHITECTURES[0].batch(torch.Generator().manual_seed(1), 2)
    for site in discover(model, batch, exclude=("*.fc2", "lm_head")).sites:
        excluded = any(operator.name.endswith("fc2") or operator.name == "lm_head" for operator in site.operators)
        assert (site.mode == "left") == excluded
        assert site.reason or not excluded

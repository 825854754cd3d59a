"""The main job from Python: what a run keeps, promises and writes, on real tiny models."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alphasmith.dashboards.study_views import HISTORY_ID, LOSSES_ID
from alphasmith.objectives.errors import InputError, IntegrityError
from alphasmith.objectives.model.loading import parameters_digest
from alphasmith.objectives.sensitivity.output_shares import MEASURED
from alphasmith.objectives.smoothing import SCALE_MAX, SCALE_MIN, Smoothing
from alphasmith.objectives.text import number
from alphasmith.search import RunResult, load_quantized, load_smoothed, run
from alphasmith.search.checkpoints.verification import undo, verify
from alphasmith.search.cli.tables import result_text
from alphasmith.search.inputs.preparation import prepare, survey
from alphasmith.search.inputs.task import load_task
from alphasmith.search.launch.site_searches import input_ranges, skip_patterns
from alphasmith.search.progress import Silent
from alphasmith.storage.database.connection import open_optuna, opened
from alphasmith.storage.output.manifest import Manifest, parse_manifest
from alphasmith.storage.runs.data_frames import AT_OUTPUT, sites_frame
from alphasmith.storage.runs.run_store import RunStore
from tests.support.plain_forms import quantize_model
from tests.support.run_cases import (
    LENGTH,
    VOCABULARY,
    WIDTH,
    Likeness,
    Mlp,
    Pictures,
    Recurrent,
    Routed,
    answer,
    launch,
    rows,
    saved_llama,
    seeded,
    settings,
    tiny_llama,
    tiny_mixtral,
    tokens,
    vectors,
)

FAST = {"search": {"noise_model": False}}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The user's model."""
    return seeded(Mlp)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> tuple[Path, RunResult]:
    """A finished run with the noise model, per-tensor static W8A8 and a metric."""
    folder = tmp_path_factory.mktemp("finished")
    metric = Likeness(model, vectors(seed=9))
    values = {"name": "first", "search": {"trials": 7}, "data": {"metric_name": "agreement"}}
    return folder, launch(folder, model, vectors(), values, metric=metric)


def guard_holds(result: RunResult) -> None:
    """No smoothed site is worse on held-out rows than any baseline, and the baselines are trials 0 to 2."""
    smoothed = result.sites[result.sites["winner"].notna()]
    assert len(smoothed)
    # Where the model's output was better off with a baseline, every site has that one, whatever is best there.
    if result.manifest.output.kept == "ours":
        for column in ("identity", "alpha_half", "best_single"):
            assert (smoothed["ours"] <= smoothed[column]).all()
    of_sites = result.trials[~result.trials["site"].isin(AT_OUTPUT)]
    for _, trials in of_sites.groupby("study_name"):
        assert list(trials.sort_values("number")["kind"][:3]) == ["identity", "alpha_0.5", "best_single"]
        assert list(trials["number"]) == list(range(len(trials)))


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_the_folder_is_complete_and_the_manifest_tells_the_truth(finished: tuple[Path, RunResult]) -> None:
    _, result = finished
    text = (result.folder / "manifest.json").read_text()
    manifest = parse_manifest(text)
    assert manifest == result.manifest
    listed = {a.path: a.sha256 for a in manifest.artifacts}
    present = {p.relative_to(result.folder).as_posix(): p for p in result.folder.rglob("*") if p.is_file()}
    assert set(listed) == set(present) - {"manifest.json"}
    assert {"smoothed/model.safetensors", "quantized/model.safetensors", "report.html"} <= set(listed)
    for path, digest in listed.items():
        assert hashlib.sha256(present[path].read_bytes()).hexdigest() == digest
    assert not [p for p in result.folder.parent.iterdir() if "partial" in p.name]


def test_every_site_has_its_share_of_the_outputs_error(finished: tuple[Path, RunResult]) -> None:
    _, result = finished
    assert math.fsum(result.sites["share"]) == pytest.approx(1)
    largest = result.sites.sort_values("share", ascending=False)["share_measured"]
    assert largest.notna().tolist() == [place < MEASURED for place in range(len(largest))]
    assert not [note for note in result.manifest.notes if "predicted" in note]
    with opened(f"sqlite:///{result.folder.parent / 'runs.db'}") as database:
        recorded = sites_frame(RunStore(database).sites(result.id)).set_index("site")["share"]
    assert recorded.to_dict() == result.sites.set_index("site")["share"].to_dict()


def test_the_users_model_keeps_every_bit(finished: tuple[Path, RunResult], model: nn.Module) -> None:
    _, result = finished
    fresh = seeded(Mlp)
    assert result.manifest.model.digest == parameters_digest(fresh) == parameters_digest(model)
    assert not model.training


def test_the_database_holds_the_run_and_optunas_own_trials(finished: tuple[Path, RunResult]) -> None:
    folder, result = finished
    database = folder / "runs.db"
    assert rows(database, "select id, status, name, reason from alphasmith_run") == [
        (result.id, "finished", "first", "")
    ]
    manifest = result.manifest
    kept = [json.loads(entry) for (entry,) in rows(database, "select entry from alphasmith_site order by position")]
    assert [(s["name"], s["mode"], s["winner"]) for s in kept] == [(s.name, s.mode, s.winner) for s in manifest.sites]
    assert [[g["alpha"] for g in s["groups"]] for s in kept] == [[g.alpha for g in s.groups] for s in manifest.sites]
    storage = open_optuna(result.storage)
    for site in manifest.sites:
        assert site.study is not None
        study = optuna.load_study(study_name=site.study, storage=storage)
        mine = result.trials[result.trials["study_name"] == site.study]
        assert len(mine) == len(study.trials) == site.trials
        assert 4 <= len(mine) <= 8  # at most 7, and the winner under another range
        for trial, told in zip(study.trials, mine.itertuples(), strict=True):
            state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}[trial.state.name]
            assert (trial.number, state, trial.user_attrs["candidate"]) == (told.number, told.state, told.kind)
            assert trial.params == {k: getattr(told, k) for k in trial.params}
            if state == "complete":
                assert trial.value == told.loss == trial.intermediate_values[max(trial.intermediate_values)]
        identity, half, single = study.trials[:3]
        assert identity.params == {}
        alphas = [{v for k, v in trial.params.items() if k.startswith("alpha_")} for trial in (half, single)]
        assert alphas == [{0.5}, {site.losses.search.best_single_alpha if site.losses else None}]
    guard_holds(result)


def test_a_result_is_shown_in_a_few_lines_and_as_html(finished: tuple[Path, RunResult]) -> None:
    result = finished[1]
    entry = result.manifest.run.model_copy(update={"name": "<b>bold</b> & more"})
    named = replace(result, manifest=result.manifest.model_copy(update={"run": entry}))
    lines = repr(named).splitlines()
    assert len(lines) <= 8
    assert max(map(len, lines)) < 200
    output = result.manifest.output
    assert output.naive is not None
    shown = [result.id, "finished", number(output.naive, 4), result.manifest.scheme.name, str(result.folder)]
    shown += [part for m in output.metrics for part in (m.name, number(m.float_model, 4), number(m.ours, 4))]
    assert [part for part in shown if part not in repr(named) or part not in named._repr_html_()] == []
    assert "<b>" in repr(named)
    assert "<b>" not in named._repr_html_()
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in named._repr_html_()
    missing = output.model_copy(update={"naive": None, "ours": None, "metrics": ()})
    assert "n/a" in repr(replace(result, manifest=result.manifest.model_copy(update={"output": missing})))


def test_every_study_shows_two_figures_and_a_note(finished: tuple[Path, RunResult]) -> None:
    _, result = finished
    storage = open_optuna(result.storage)
    for site in result.manifest.sites:
        study = optuna.load_study(study_name=site.study, storage=storage)
        kept = storage.get_study_system_attrs(study._study_id)
        assert any(site.name in str(value) for key, value in kept.items() if "note" in key)
        assert all(any(figure in key for key in kept) for figure in (LOSSES_ID, HISTORY_ID))


def test_the_metric_is_told_for_every_variant(finished: tuple[Path, RunResult]) -> None:
    _, result = finished
    (metric,) = result.manifest.output.metrics
    assert (metric.name, metric.higher_is_better, metric.float_model) == ("agreement", True, 1.0)
    shares = (metric.naive, metric.alpha_half, metric.best_single, metric.ours)
    assert all(share is not None and 0.0 < share <= 1.0 for share in shares)
    output = result.manifest.output
    assert output.ours is not None
    assert output.naive is not None
    assert output.ours < output.naive  # the loud channels hurt without smoothing


# ----------------------------------------------------------------------------------------------- the products again


def test_the_smoothed_model_is_the_original_and_undo_gives_it_back(
    finished: tuple[Path, RunResult], model: nn.Module, tmp_path: Path
) -> None:
    _, result = finished
    value = vectors(seed=5)[0]
    smoothed = load_smoothed(result.folder, model)
    expected, got = answer(model, value), answer(smoothed, value)
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert parameters_digest(smoothed) != parameters_digest(model)
    told = undo(result.folder, tmp_path / "undone")
    assert told["parameters"] > 0
    undone = load_file(tmp_path / "undone" / "model.safetensors")
    assert set(undone) == set(model.state_dict())
    for name, original in model.state_dict().items():
        # A bias that took in a shift is off by a rounding of the shift, which may be larger than the bias.
        torch.testing.assert_close(undone[name], original, rtol=1e-6, atol=1e-6 if name.endswith("bias") else 0)


def test_rounded_scales_are_taken_out_to_the_bit_and_their_cost_is_told(tmp_path: Path, model: nn.Module) -> None:
    metric = Likeness(model, vectors(seed=9))
    values = {"round_scales": "pow2", "search": {"trials": 5}, "data": {"metric_name": "agreement"}}
    result = launch(tmp_path, model, vectors(), values, metric=metric)
    scales = {n: t for n, t in load_file(result.folder / "scales.safetensors").items() if n.startswith("scale/")}
    assert any(bool((value != 1).any()) for value in scales.values())
    folded = [f"scale/{site.name}" for site in result.manifest.sites if site.mode == "fold"]
    assert all(torch.equal(scales[name].log2(), scales[name].log2().round()) for name in folded if name in scales)
    assert not any(site.shift for site in result.manifest.sites)
    undo(result.folder, tmp_path / "undone")
    undone = load_file(tmp_path / "undone" / "model.safetensors")
    smoothed = load_file(result.folder / "smoothed" / "model.safetensors")
    for name, original in model.state_dict().items():
        assert torch.equal(undone[name].view(torch.int32), original.view(torch.int32)), name
    assert any(not torch.equal(smoothed[name], original) for name, original in model.state_dict().items())
    cost = result.manifest.rounding
    assert cost is not None
    assert (cost.to, cost.inexact) == ("pow2", ())
    assert cost.sites == sum(name in scales for name in folded)
    kept = result.manifest.output.kept
    assert cost.after == getattr(result.manifest.output, "alpha_half" if kept == "alpha_0.5" else kept)
    told = next(note for note in result.manifest.notes if note.startswith("scales are powers of two at"))
    assert "held-out output loss" in told
    assert cost.before is not None
    assert cost.after is not None
    assert cost.difference == pytest.approx(cost.before - cost.after, rel=1e-4, abs=1e-9)


def test_reloaded_integers_give_the_bits_that_were_quantized(
    finished: tuple[Path, RunResult], model: nn.Module
) -> None:
    folder, result = finished
    config = settings(folder, {"search": {"trials": 7}, "out": None})
    task = load_task(config, model=model, batches=vectors())
    prepared = prepare(config, task, survey(config, task), Silent())
    kept = load_file(result.folder / "scales.safetensors")
    rebuilt = prepared.survey.model
    summary = quantize_model(
        rebuilt,
        prepared.sites,
        smoothings={
            site.name: Smoothing(
                scales=kept[f"scale/{site.name}"],
                shift=kept.get(f"shift/{site.name}"),
                range_factor=site.range_factor,
            )
            for site in result.manifest.sites
            if f"scale/{site.name}" in kept
        },
        ranges=input_ranges(prepared),
        scheme=config.scheme.build(),
        skip=skip_patterns(config, prepared),
    )
    for value in vectors(16, seed=6):
        first = answer(load_quantized(result.folder, model), value)
        assert torch.equal(first, answer(load_quantized(result.folder, seeded(Mlp, seed=8)), value))
        assert torch.equal(first, answer(rebuilt, value))
        assert not torch.equal(first, answer(model, value))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    stored = load_file(result.folder / "quantized" / "model.safetensors")
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.int8) == weights
    payload = result.manifest.payload
    assert payload.weights_quantized == weights == summary.payload_bytes
    assert payload.weights_float == 4 * payload.weights_quantized


def test_a_changed_byte_is_noticed_by_every_reader(
    finished: tuple[Path, RunResult], model: nn.Module, tmp_path: Path
) -> None:
    _, result = finished
    readers: dict[str, list[Callable[[Path], Any]]] = {
        "smoothed/model.safetensors": [lambda f: load_smoothed(f, model), lambda f: undo(f, tmp_path / "never")],
        "quantized/model.safetensors": [lambda f: load_quantized(f, model)],
    }
    for file, openers in readers.items():
        copy = tmp_path / Path(file).parent.name
        for path in result.folder.rglob("*"):
            if path.is_file():
                target = copy / path.relative_to(result.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        content = bytearray((copy / file).read_bytes())
        content[-1] ^= 1
        (copy / file).write_bytes(content)
        for opener in openers:
            with pytest.raises(IntegrityError, match="changed or damaged"):
                opener(copy)
    assert not (tmp_path / "never").exists()


def test_verify_says_what_it_cannot_find_again(finished: tuple[Path, RunResult], tmp_path: Path) -> None:
    _, result = finished
    told = verify(result.folder)
    assert told["artifacts"] == len(result.manifest.artifacts)
    assert "handed over by a script" in told["skipped"]
    folder = saved_llama(tmp_path / "model")
    config = settings(tmp_path, {**FAST, "model": {"path": folder}, "sites": {"exclude": ["*proj"]}})
    by_script = run(config, batches=tokens())
    assert by_script.manifest.model.kind == "hf"
    assert "the data were handed over by a script" in verify(by_script.folder)["skipped"]
    # A manifest names functions, but reading it runs none of them.
    manifest = json.loads((by_script.folder / "manifest.json").read_text())
    manifest["config"]["data"]["factory"] = "no_such_module:batches"
    (by_script.folder / "manifest.json").write_text(json.dumps(manifest))
    assert "no_such_module:batches, which is not run unasked" in verify(by_script.folder)["skipped"]


def test_an_architecture_is_asked_for_and_must_fit(finished: tuple[Path, RunResult]) -> None:
    _, result = finished
    for load in (load_quantized, load_smoothed):
        with pytest.raises(InputError, match="pass the"):
            load(result.folder)
        with pytest.raises(InputError):
            load(result.folder, seeded(Pictures))


# ------------------------------------------------------------------------------------------------------ all schemes


@pytest.mark.parametrize(
    "scheme",
    [
        {"activation_granularity": "token"},
        {"weight_granularity": "tensor"},
        {"weights": "int4"},
        {"weights": "int4", "weight_granularity": "group", "group_size": 8, "activations": "none"},
        {"weights": "fp8", "activations": "fp8"},
    ],
    ids=lambda scheme: "-".join(str(v) for v in scheme.values()),
)
def test_never_worse_than_any_baseline(scheme: dict[str, Any], tmp_path: Path, model: nn.Module) -> None:
    result = launch(tmp_path, model, vectors(), {"scheme": scheme, **FAST})
    guard_holds(result)
    value = vectors(seed=4)[0]
    quantized = answer(load_quantized(result.folder, model), value)
    expected = answer(model, value)
    assert float((quantized - expected).norm() / expected.norm()) < 0.5
    for site in result.manifest.sites:
        for group in site.groups:
            assert 0.0 <= group.low <= group.high <= 1.0
            assert (group.low >= 0.1 and group.high <= 0.9) or "widened" in group.explanation


# -------------------------------------------------------------------------------------------------- other structures


def test_an_unrolled_lstm_keeps_the_users_names(tmp_path: Path) -> None:
    model = seeded(Recurrent)
    result = launch(tmp_path, model, tokens(), FAST)
    guard_holds(result)
    saved = load_file(result.folder / "smoothed" / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert any(not torch.equal(saved[n], v) for n, v in model.state_dict().items())
    value = tokens(8, seed=7)[0]
    torch.testing.assert_close(
        answer(load_smoothed(result.folder, model), value), answer(model, value), rtol=1e-4, atol=1e-5
    )
    first, second = (answer(load_quantized(result.folder, model), value) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (8, LENGTH, VOCABULARY)
    undo(result.folder, tmp_path / "undone")
    undone = load_file(tmp_path / "undone" / "model.safetensors")
    for name, original in model.state_dict().items():
        # A bias that took in a shift is off by a rounding of the shift, which may be larger than the bias.
        torch.testing.assert_close(undone[name], original, rtol=1e-6, atol=1e-6 if name.endswith("bias") else 0)


def test_convolutions_fold_and_what_cannot_is_said(tmp_path: Path) -> None:
    model = seeded(Pictures)
    values = {**FAST, "sites": {"explicit": "never"}}
    result = launch(tmp_path, model, vectors(48, 3, 6, 6, seed=2), values)
    guard_holds(result)
    modes = {s.name: s.mode for s in result.manifest.sites}
    assert modes == {"stem": "left", "body": "fold", "head": "fold"}
    (stem,) = [s for s in result.manifest.sites if s.name == "stem"]
    assert "explicit scaling is off" in stem.reason
    assert stem.winner is None
    assert stem.groups == ()
    scales = load_file(result.folder / "scales.safetensors")
    assert {n.split("/")[1] for n in scales} == {"body", "head"}


def test_expert_inputs_are_left_unless_asked_for(tmp_path: Path) -> None:
    for experts in (False, True):
        values = {**FAST, "sites": {"experts": experts, "exclude": ["head"]}}
        result = launch(tmp_path / str(experts), seeded(Routed), vectors(), values)
        (fed,) = [s for s in result.manifest.sites if "router" in s.operators]
        assert {"experts.0", "experts.1"} < set(fed.operators)
        assert (fed.winner is not None) == experts
        assert ("expert inputs are not smoothed" in fed.reason) == (not experts)
        assert not result.manifest.skipped  # quantized either way
    guard_holds(result)


def test_experts_used_by_functional_calls_are_quantized_and_the_rest_is_told_of(tmp_path: Path) -> None:
    result = launch(tmp_path, tiny_mixtral(), tokens(), {**FAST, "search": {"scope": "model", "trials": 4}})
    left = {s.name for s in result.manifest.sites if "expert" in s.reason}
    assert left
    skipped = {s.name: s.reason for s in result.manifest.skipped}
    assert not [name for name in skipped if "experts" in name]
    (router,) = [name for name in skipped if "gate" in name]
    assert "functional call" in skipped[router]
    stored = load_file(result.folder / "quantized" / "model.safetensors")
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        assert stored[f"{name}.weight_values"].dtype == torch.int8
        assert name not in stored
    assert any("only the weights are quantized" in note for note in result.manifest.notes)
    ids = tokens(8, seed=7)[0]
    for skeleton in (None, tiny_mixtral()):  # from the configuration, and given
        quantized, again = (answer(load_quantized(result.folder, skeleton), ids) for _ in range(2))
        assert torch.equal(quantized, again)
        expected = answer(tiny_mixtral(), ids)
        assert 0 < float((quantized - expected).norm() / expected.norm()) < 0.3
    # What was quantized may be a quarter of its size; the whole model is told of, and everything that stayed.
    model, payload = tiny_mixtral(), result.manifest.payload
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    entries = {w.name: w for w in result.manifest.weights}
    assert entries.keys() == sizes.keys()
    assert 4 * sum(sizes[n] for n, w in entries.items() if w.status == "quantized") == payload.weights_float
    assert payload.model_float is not None
    assert payload.model_float >= 4 * sum(p.numel() for p in model.parameters())
    told = result_text(result, 1000)
    assert (
        f"({(payload.weights_quantized + payload.other) / payload.model_float:.2g} of the whole model in float32)"
        in told
    )
    (account,) = [note for note in result.manifest.notes if "stay float" in note]
    assert skipped[router] in told
    assert skipped[router] in account


def test_excluded_and_skipped_operators(tmp_path: Path, model: nn.Module) -> None:
    result = launch(tmp_path, model, vectors(), {**FAST, "sites": {"exclude": ["fc1"], "skip": ["he*"]}})
    found = {s.name: s for s in result.manifest.sites}
    assert found["fc1"].mode == "left"
    assert found["fc1"].winner is None
    assert found["fc2"].winner is not None
    assert found["head"].winner is None
    assert [s.name for s in result.manifest.skipped] == ["head"]
    linear = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert result.manifest.payload.weights_quantized == linear["fc1"] + linear["fc2"]
    quantized = load_quantized(result.folder, model)
    assert torch.equal(quantized.get_parameter("head.weight"), model.get_parameter("head.weight"))


def test_tied_weights_stay_tied_and_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        """One table embeds and reads out."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
            self.fc = nn.Linear(WIDTH, WIDTH)
            self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            """(B, L) -> (B, L, VOCABULARY)."""
            return torch.as_tensor(self.out(self.fc(self.norm(self.table(ids)))))

    model = seeded(Tied)
    result = launch(tmp_path, model, tokens(), FAST)
    guard_holds(result)
    saved = load_file(result.folder / "smoothed" / "model.safetensors")
    assert len(saved) == len(model.state_dict()) - 1
    smoothed = load_smoothed(result.folder, model)
    value = tokens(8, seed=7)[0]
    torch.testing.assert_close(answer(smoothed, value), answer(model, value), rtol=1e-4, atol=1e-5)
    undo(result.folder, tmp_path / "undone")
    for name, tensor in load_file(tmp_path / "undone" / "model.safetensors").items():
        torch.testing.assert_close(
            tensor, model.state_dict()[name], rtol=1e-6, atol=1e-6 if name.endswith("bias") else 0
        )


# --------------------------------------------------------------------------------------------- hardware, determinism


def test_a_scarce_target_raises_the_low_ends(tmp_path: Path, model: nn.Module) -> None:
    def launched(folder: str, values: dict[str, Any]) -> Manifest:
        (tmp_path / folder).mkdir()
        return launch(tmp_path / folder, model, vectors(), {**FAST, "groups": {"ranges": "strict"}, **values}).manifest

    roomy, scarce = launched("roomy", {}), launched("scarce", {"hardware": {"memory": 500}})
    assert roomy.hardware.rho == 0.0
    assert scarce.hardware.budget.memory == 500
    assert scarce.hardware.required.memory is not None
    assert scarce.hardware.rho == pytest.approx(1 - 500 / scarce.hardware.required.memory)
    assert 0 < scarce.hardware.rho < 1
    for before, after in zip(roomy.sites, scarce.sites, strict=True):
        for a, b in zip(before.groups, after.groups, strict=True):
            assert b.high == a.high
            assert b.low == pytest.approx(a.low + scarce.hardware.rho * (a.high - a.low))
    assert scarce.space_hash != roomy.space_hash


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, model: nn.Module) -> None:
    def told(folder: str, seed: int) -> str:
        (tmp_path / folder).mkdir()
        values = {"search": {"trials": 6, "seed": seed}, "sites": {"exclude": ["fc1", "head"]}}
        return launch(tmp_path / folder, model, vectors(), values).manifest.without_times()

    first = told("a", 3)
    assert first == told("b", 3)
    before, other = json.loads(first), json.loads(told("c", 4))
    assert other["model"] == before["model"]
    assert other["output"] != before["output"]


@pytest.mark.parametrize("sampler", ["qmc", "random", "cmaes", "gp"])
def test_samplers_by_name(sampler: str, tmp_path: Path, model: nn.Module) -> None:
    values = {"search": {"noise_model": False, "sampler": sampler, "trials": 6}, "sites": {"exclude": ["fc1", "head"]}}
    result = launch(tmp_path, model, vectors(), values)
    guard_holds(result)
    drawn = result.trials[result.trials["kind"] == "sampler"]
    (site,) = [s for s in result.manifest.sites if s.winner is not None]
    assert len(drawn) == 3
    for group in site.groups:
        assert drawn[f"alpha_{group.index}"].between(group.low, group.high).all()
        assert drawn[f"alpha_{group.index}"].nunique() == 3


def test_fewer_groups_than_asked_for_is_a_warning(tmp_path: Path, model: nn.Module) -> None:
    heard: list[str] = []

    class MessageLog(Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    result = launch(tmp_path, model, vectors(), {**FAST, "groups": {"k": 40}}, progress=MessageLog())
    (note,) = [note for note in result.manifest.notes if "groups.k" in note]
    assert note.startswith("groups.k = 40 is reduced to")
    assert f"warning: {note}" in heard
    assert all(len(s.groups) <= s.channels < 40 for s in result.manifest.sites)
    guard_holds(result)


@pytest.mark.parametrize("statistic", ["percentile", "rms"])
def test_other_statistics_are_recorded_with_their_alphas(statistic: str, tmp_path: Path, model: nn.Module) -> None:
    values = {"search": {"noise_model": False, "statistic": statistic}, "groups": {"method": "multi_outlier", "k": 3}}
    result = launch(tmp_path, model, vectors(), values)
    guard_holds(result)
    conventions = result.manifest.conventions
    assert conventions.statistic == statistic
    assert (conventions.percentile is not None) == (statistic == "percentile")
    assert (conventions.clamp, conventions.clamp_max) == (SCALE_MIN, SCALE_MAX)


def test_a_transformers_module_is_saved_as_a_folder_that_loads(tmp_path: Path) -> None:
    model = tiny_llama()
    result = launch(tmp_path, model, tokens(), FAST)
    guard_holds(result)
    value = tokens(8, seed=7)[0]
    smoothed = load_smoothed(result.folder)  # no architecture needed
    torch.testing.assert_close(answer(smoothed, value), answer(model, value), rtol=1e-4, atol=1e-5)
    assert torch.equal(
        answer(load_quantized(result.folder), value), answer(load_quantized(result.folder, model), value)
    )
    (metric,) = result.manifest.output.metrics
    assert metric.name == "perplexity"
    assert metric.float_model is not None
    assert 1 < metric.float_model < math.inf


@pytest.mark.parametrize("scope", ["site", "model"])
def test_every_stage_counts_all_of_its_work(scope: str, tmp_path: Path, model: nn.Module) -> None:
    # A refinement that counts trials only stands still for all of its probes and then tells a wrong time.
    counted: dict[str, list[int]] = {}

    class Counted(Silent):
        def stage(self, name: str, total: int | None = None) -> None:
            if total is not None:
                counted[name] = [total, 0]
            self.now = name

        def advance(self, detail: str = "") -> None:
            counted.setdefault(self.now, [0, 0])[1] += 1

    launch(
        tmp_path, model, vectors(), {"search": {"scope": scope, "refine": True, "refine_trials": 7}}, progress=Counted()
    )
    assert all(total == done for total, done in counted.values()), counted
    stages = ("refining kinds of sites", "refining single sites")
    assert all((stage in counted) == (scope == "site") for stage in stages)
    assert ("one alpha for the whole model" in counted) == (scope == "site")
    # Trials, and what is scored on held-out samples.
    assert all(counted.get(stage, [99])[0] >= 7 + 1 for stage in stages)

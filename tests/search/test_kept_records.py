"""What a run keeps of a richer search: the database, the manifest, the tensors and Optuna's trials say the same."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import optuna
import pytest
from optuna_dashboard import get_note
from safetensors.torch import load_file

from alphasmith.search import RunResult, refinement
from alphasmith.search.config import SearchConfig
from alphasmith.storage.database import open_existing, optuna_storage
from alphasmith.storage.frames import REFINEMENT
from alphasmith.storage.manifest import Manifest, schema
from alphasmith.storage.manifest_parts import RefinementEntry, SearchFacts
from alphasmith.storage.records import RunStore
from tests.search.run_cases import Mlp, launch, seeded, vectors, with_loud_channels


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    """A finished run and its database; the best trial of the refinement is accepted, whatever its scatter is."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "paired_difference", lambda *_: (1.0, 0.5))
        result = launch(folder, with_loud_channels(seeded(Mlp)), vectors(), {"search": {"trials": 6, "refine": True}})
    return result, folder / "runs.db"


def store_of(file: Path) -> RunStore:
    return RunStore(open_existing(f"sqlite:///{file}"))


def test_the_manifest_fits_its_schema(kept: tuple[RunResult, Path]) -> None:
    written = json.loads((kept[0].folder / "manifest.json").read_text())
    jsonschema.validate(written, schema())
    assert Manifest.model_validate(written) == kept[0].manifest


def test_database_and_manifest_agree_on_every_site(kept: tuple[RunResult, Path]) -> None:
    result, file = kept
    entries = {site.name: site for site in result.manifest.sites}
    for site in store_of(file).sites(result.id):
        entry = entries[site.name]
        names = ("shift", "range_statistic", "range_factor", "grouping", "statistic", "winner", "trials", "channels")
        assert [getattr(site, n) for n in names] == [getattr(entry, n) for n in names]
        assert (site.grouping, site.statistic) == ("kmeans", "absmax")
        groups = [(g.alpha, g.beta, g.offset, g.size) for g in site.groups]
        assert groups == [(g.alpha, g.beta, g.offset, g.size) for g in entry.groups]
        assert site.held_out is not None
        assert entry.losses is not None
        assert (site.held_out.ours, site.held_out.limit) == (entry.losses.held_out.ours, entry.losses.held_out.limit)
        assert site.facts is not None
        assert SearchFacts.model_validate(site.facts) == entry.facts
        assert site.facts["stopped"]


def test_tensors_hold_a_shift_where_the_manifest_says_so(kept: tuple[RunResult, Path]) -> None:
    manifest = kept[0].manifest
    tensors = load_file(kept[0].folder / "scales.safetensors")
    named = {f"scale/{s.name}" for s in manifest.sites}
    named |= {f"shift/{s.name}" for s in manifest.sites if s.shift}
    named |= {edit.channel for s in manifest.sites for edit in s.edits}
    named |= {edit.channel for s in manifest.sites for edit in s.shift_edits}
    assert set(tensors) == named
    for site in manifest.sites:
        assert tensors[f"scale/{site.name}"].shape == (site.channels,)
        if site.shift:
            assert tensors[f"shift/{site.name}"].shape == (site.channels,)
        else:
            assert site.shift_edits == ()


def test_the_refinement_is_kept_three_times(kept: tuple[RunResult, Path]) -> None:
    result, file = kept
    entry = result.manifest.refinement
    assert entry is not None
    store = store_of(file)
    record = store.get(result.id)
    assert record.refinement is not None
    assert RefinementEntry.model_validate(record.refinement) == entry
    trials = store.trials(result.id, study_name=f"{result.id}/{REFINEMENT}")
    assert len(trials) == entry.trials == SearchConfig().refine_trials
    assert trials[0].kind == "refined"
    assert entry.accepted
    refined = {site.name for site in store.sites(result.id) if site.winner == "refined"}
    assert refined == set(entry.changed) != set()
    page = (result.folder / "report.html").read_text()
    assert "Refinement at the output" in page


def test_digests_are_optunas_trials(kept: tuple[RunResult, Path]) -> None:
    result, file = kept
    database = open_existing(f"sqlite:///{file}")
    storage = optuna_storage(database)
    digests = RunStore(database).trials(result.id)
    for name in sorted({digest.study_name for digest in digests}):
        study = optuna.load_study(study_name=name, storage=storage)
        mine = {digest.trial_number: digest for digest in digests if digest.study_name == name}
        assert sorted(mine) == [trial.number for trial in study.trials]
        for trial in study.trials:
            digest = mine[trial.number]
            assert digest.loss == (trial.value if trial.state == optuna.trial.TrialState.COMPLETE else None)
            # A choice with one value is no parameter of Optuna's.
            assert trial.params.items() <= dict(digest.params).items()
    database.close()


def test_every_study_says_how_its_sites_fared(kept: tuple[RunResult, Path]) -> None:
    result, file = kept
    database = open_existing(f"sqlite:///{file}")
    storage = optuna_storage(database)
    for of in (*(site.name for site in result.manifest.sites), REFINEMENT):
        study = optuna.load_study(study_name=f"{result.id}/{of}", storage=storage)
        note = get_note(study)
        assert "best single alpha " in note
        assert ", ours " in note
        assert ("accepted" in note) == (of == REFINEMENT)
    database.close()

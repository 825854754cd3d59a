"""What a run keeps of a richer search: the database, the manifest, the tensors and Optuna's trials say the same."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import optuna
import pytest
from optuna_dashboard import get_note
from safetensors.torch import load_file

from alphasmith.search import RunResult
from alphasmith.search.config import SearchConfig
from alphasmith.search.launch import _outcome
from alphasmith.search.model import _descent, held_out
from alphasmith.storage.database.connection import open_existing, optuna_storage
from alphasmith.storage.output.entries import RefinementEntry
from alphasmith.storage.output.manifest import Manifest, schema
from alphasmith.storage.runs.data_frames import ONE_ALPHA, REFINEMENT_KINDS, REFINEMENT_SITES
from alphasmith.storage.runs.entries import SiteRecord
from alphasmith.storage.runs.run_store import RunStore
from tests.support.run_cases import Mlp, launch, seeded, vectors, with_loud_channels


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    """A finished run and its database; every move of the refinement is accepted and kept, whatever its scatter is."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        for judge in (_descent, held_out):
            patch.setattr(judge, "paired_difference", lambda *_: (1.0, 0.5))
        patch.setattr(_outcome, "kept_variant", lambda *_: "ours")
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
        assert site == SiteRecord(**{name: getattr(entry, name) for name in SiteRecord.model_fields})
        assert (site.grouping, site.statistic, site.kind) == ("kmeans", "absmax", "linear")
        assert site.losses is not None
        assert site.facts is not None
        assert site.facts.stopped
        assert site.groups


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
    for step, of in zip(entry.steps, (REFINEMENT_KINDS, REFINEMENT_SITES), strict=True):
        trials = store.trials(result.id, study_name=f"{result.id}/{of}")
        assert 0 < len(trials) == step.trials <= SearchConfig().refine_trials
        assert trials[0].kind == "refined"
    assert entry.trials == sum(step.trials for step in entry.steps)
    assert entry.accepted
    refined = {site.name for site in store.sites(result.id) if site.winner == "refined"}
    assert refined == set(entry.changed) != set()
    page = (result.folder / "report.html").read_text()
    assert "Refinement at the output" in page


def test_trials_are_optunas(kept: tuple[RunResult, Path]) -> None:
    result, file = kept
    database = open_existing(f"sqlite:///{file}")
    storage = optuna_storage(database)
    records = RunStore(database).trials(result.id)
    assert len({record.study_name for record in records}) == len(result.manifest.sites) + 3
    for name in sorted({record.study_name for record in records}):
        study = optuna.load_study(study_name=name, storage=storage)
        mine = [record for record in records if record.study_name == name]
        assert [record.number for record in mine] == [trial.number for trial in study.trials]
        for record, trial in zip(mine, study.trials, strict=True):
            complete = trial.state == optuna.trial.TrialState.COMPLETE
            assert (record.state == "complete") == complete
            assert record.loss == (trial.value if complete else None)
            assert record.params == trial.params
            assert record.seconds == trial.user_attrs["seconds"] > 0
    database.close()


def test_every_study_says_how_its_sites_fared(kept: tuple[RunResult, Path]) -> None:
    result, file = kept
    database = open_existing(f"sqlite:///{file}")
    storage = optuna_storage(database)
    steps = (REFINEMENT_KINDS, REFINEMENT_SITES)
    for of in (*(site.name for site in result.manifest.sites), ONE_ALPHA, *steps):
        study = optuna.load_study(study_name=f"{result.id}/{of}", storage=storage)
        note = get_note(study)
        assert "best single alpha " in note
        assert ", ours " in note
        assert ("accepted" in note) == (of in steps)
    database.close()

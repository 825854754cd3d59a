"""The batch size is a matter of memory: it decides no split, no digest, no row and no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.calibration.calibrate import Calibration
from alphasmith.search import resume
from alphasmith.search.inputs.preparation import prepare, survey
from alphasmith.search.inputs.task import Task, load_task
from alphasmith.search.interruption import Interrupted
from alphasmith.search.launch._lookup import config_digest
from alphasmith.search.progress import Silent
from tests.support.run_cases import (
    REFINED,
    Mlp,
    Pictures,
    Recurrent,
    launch,
    rows,
    seeded,
    settings,
    tiny_llama,
    tokens,
    vectors,
)


def sized(size: int, values: dict[str, Any] | None = None) -> dict[str, Any]:
    return {**(values or {}), "data": {"batch_size": size}}


def pictures() -> list[Tensor]:
    return vectors(48, 3, 8, 8)


def taken(folder: Path, model: nn.Module, batches: list[Tensor], size: int) -> tuple[Task, Calibration]:
    config = settings(folder, sized(size))
    task = load_task(config, model=model, batches=batches)
    return task, prepare(config, task, survey(config, task), Silent()).calibration


@pytest.mark.parametrize(
    ("build", "batches"), [(Mlp, vectors()), (Recurrent, tokens()), (Pictures, pictures()), (tiny_llama, tokens())]
)
def test_splits_digest_and_rows_are_those_of_one_sample_at_a_time(
    build: Any, batches: list[Tensor], tmp_path: Path
) -> None:
    model = build() if build is tiny_llama else seeded(build)
    (one, alone), (seven, together) = (taken(tmp_path, model, batches, size) for size in (1, 7))
    assert one.data_digest == seven.data_digest
    for name in ("calibration", "held_out", "proof"):
        first, second = (torch.cat([b.args[0] for b in getattr(task, name)]) for task in (one, seven))
        assert torch.equal(first, second)
    assert max(b.size for b in seven.calibration) == 7
    assert alone.sites.keys() == together.sites.keys()
    for name, record in alone.sites.items():
        other = together.record(name)
        torch.testing.assert_close(record.low, other.low)
        for part, same in zip(record.parts, other.parts, strict=True):
            torch.testing.assert_close(part.x, same.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["site", pytest.param("model", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_result_is_the_same_within_rounding(scope: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"search": {**REFINED["search"], "scope": scope}}
    found = {}
    for size in (1, 8):
        (tmp_path / str(size)).mkdir()
        found[size] = launch(tmp_path / str(size), tiny_llama(), tokens(), sized(size, values))
    digests = {
        rows(tmp_path / str(size) / "runs.db", "SELECT config_digest, data_digest FROM alphasmith_run")[0]
        for size in found
    }
    assert len(digests) == 1
    columns = ["number", "kind", "state"]
    assert found[1].trials[columns].equals(found[8].trials[columns])
    assert found[1].trials["loss"].tolist() == pytest.approx(found[8].trials["loss"].tolist(), rel=1e-3, nan_ok=True)


def test_a_smaller_batch_goes_on_with_the_run(tmp_path: Path) -> None:
    def recorded() -> list[tuple[Any, ...]]:
        return (
            rows(tmp_path / "runs.db", "SELECT id, status FROM alphasmith_run")
            if (tmp_path / "runs.db").exists()
            else []
        )

    model = seeded(Mlp)
    for size in (8, 3):
        with pytest.raises(Interrupted, match="on record"):
            launch(tmp_path, model, vectors(), sized(size, REFINED), stop=lambda: bool(recorded()))
    ((run_id, _),) = recorded()
    resume(
        run_id,
        storage=f"sqlite:///{tmp_path / 'runs.db'}",
        changes={"data": {"batch_size": 1}},
        model=model,
        batches=vectors(),
    )
    assert recorded() == [(run_id, "finished")]
    first, second = (settings(tmp_path, sized(size)) for size in (1, 8))
    assert config_digest(first) == config_digest(second)

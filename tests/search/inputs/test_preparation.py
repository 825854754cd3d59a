"""From a task to searchable sites: order, exclusions, splits, memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.search.inputs._plain_model import float_output
from alphasmith.search.inputs.preparation import (
    PreparedModel,
    check_output,
    prepare,
    producers_first,
    survey,
)
from alphasmith.search.inputs.task import Task, load_task
from alphasmith.search.progress import Silent
from tests.support.run_cases import Mlp, Recurrent, seeded, settings, tiny_llama, tokens, vectors


def prepared(folder: Path, model: nn.Module, batches: Any, values: dict[str, Any] | None = None) -> PreparedModel:
    """Everything before the search."""
    config = settings(folder, values)
    task = load_task(config, model=model, batches=batches)
    return prepare(config, task, survey(config, task), Silent())


def test_whoever_writes_into_anothers_weights_comes_first(tmp_path: Path) -> None:
    found = prepared(tmp_path, tiny_llama(), tokens())
    place = {name: i for i, name in enumerate(found.order)}
    layer = "model.layers.0"
    assert set(place) == {s.name for s in found.sites}
    # Folding the input of o_proj scales rows of v_proj, that of down_proj rows of up_proj.
    assert place[f"{layer}.self_attn.o_proj"] < place[f"{layer}.self_attn.q_proj"]
    assert place[f"{layer}.mlp.down_proj"] < place[f"{layer}.mlp.gate_proj"]
    names = [s.name for s in found.sites]
    for order in itertools.islice(itertools.permutations(found.sites), 24):
        sorted_ = [s.name for s in producers_first(order)]
        assert sorted(sorted_) == sorted(names)
        assert sorted_.index(f"{layer}.self_attn.o_proj") < sorted_.index(f"{layer}.self_attn.q_proj")


def test_the_objective_at_the_output_weighs_the_rows_of_both_splits(tmp_path: Path) -> None:
    values = {"search": {"objective": "output"}}
    found = prepared(tmp_path, tiny_llama(), tokens(), values)
    plain = prepared(tmp_path, tiny_llama(), tokens())
    for weighed, without in ((found.calibration, plain.calibration), (found.held_out, plain.held_out)):
        assert set(weighed.sites) == set(without.sites)
        for name, record in weighed.sites.items():
            for part, same in zip(record.parts, without.sites[name].parts, strict=True):
                assert torch.equal(part.x, same.x)
                assert part.row_weight is not None
                # Every output of the head is one of the model.
                assert (float(part.row_weight.std()) > 0) == (name != "lm_head")
                assert same.row_weight is None


def test_splits_are_disjoint_and_depend_on_the_seed(tmp_path: Path) -> None:
    def split(seed: int) -> Task:
        values = {"data": {"samples": 24, "tuning": 8}, "search": {"seed": seed}}
        return load_task(settings(tmp_path, values), model=seeded(Mlp), batches=vectors())

    task = split(0)
    splits = (task.calibration, task.tuning, task.held_out, task.proof)
    parts = [torch.cat([b.args[0] for b in part]) for part in splits]
    assert [len(p) for p in parts] == [24, 8, 12, 4]
    together = torch.cat(parts).flatten(1)
    assert len(together.unique(dim=0)) == 48
    assert task.data_digest == split(1).data_digest
    assert not torch.equal(parts[3], torch.cat([b.args[0] for b in split(1).proof]))
    assert torch.equal(parts[3], torch.cat([b.args[0] for b in split(0).proof]))
    assert task.judging == task.tuning


def test_few_samples_keep_the_proportions(tmp_path: Path) -> None:
    task = load_task(settings(tmp_path), model=seeded(Mlp), batches=vectors(12))
    sizes = [sum(b.size for b in part) for part in (task.calibration, task.tuning, task.held_out, task.proof)]
    assert sizes == [8, 0, 3, 1]
    assert task.notes == ("12 samples instead of 48: splits keep their proportions",)
    assert task.judging == task.calibration, "where there is nothing else to judge candidates on"
    tuned = load_task(settings(tmp_path, {"data": {"tuning": 16}}), model=seeded(Mlp), batches=vectors(32))
    sizes = [sum(b.size for b in part) for part in (tuned.calibration, tuned.tuning, tuned.held_out, tuned.proof)]
    assert sizes == [16, 8, 6, 2]


def test_the_survey_works_on_a_private_copy(tmp_path: Path) -> None:
    model = seeded(Recurrent)
    config = settings(tmp_path)
    task = load_task(config, model=model, batches=tokens())
    found = survey(config, task)
    assert found.rewriting.renamed  # unrolled, and every tensor still known by the user's name
    assert set(found.rewriting.renamed.values()) <= set(model.state_dict())
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.zero_()
    assert all(bool(p.abs().sum() > 0) for p in task.loaded.model.parameters())


def test_left_sites_are_not_ordered(tmp_path: Path) -> None:
    found = prepared(tmp_path, seeded(Mlp), vectors(), {"sites": {"exclude": ["fc1"], "skip": ["fc2"]}})
    assert found.order == ("head",)
    assert {s.name for s in found.sites} == {"fc1", "fc2", "head"}


def test_rows_are_bounded_by_the_plan(tmp_path: Path) -> None:
    found = prepared(tmp_path, seeded(Mlp), vectors())
    assert found.plan.rows == 64
    for record in (*found.calibration.sites.values(), *found.held_out.sites.values()):
        assert all(part.x.shape[0] <= found.plan.rows for part in record.parts)
        assert record.rows_seen > found.plan.rows


def test_outputs_are_checked_on_real_positions_only() -> None:
    class Log(nn.Module):
        """-inf for zeros."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Elementwise."""
            return x.log()

    x = torch.ones(2, 3, 4)
    x[0, 2] = 0.0
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 2] = False
    device = torch.device("cpu")
    check_output(Log(), [Batch(args=(x,), mask=mask)], device)
    with pytest.raises(InputError, match="batch 1"):
        check_output(Log(), [Batch(args=(x,), mask=mask), Batch(args=(x,))], device)
    assert float_output(Log(), Batch(args=(x,), mask=mask)).shape == (5, 4)
    with pytest.raises(InputError, match="data: the model cannot be run on it"):
        float_output(Log(), Batch(args=(x, x)))

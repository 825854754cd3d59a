"""Layers that are a branch beside a quantized residual are packed as they are stored and come back bit by bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.branch.layers import BranchModule
from alphasmith.objectives.joint.branch.placement import branch_layers
from alphasmith.objectives.joint.branch.rows import collect_rows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.packed.packing import PackedModel, PackedSettings, model_bytes, pack, read_packed
from alphasmith.objectives.joint.packed.restoring import load_packed, restore
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from tests.support.joint_models import Crn, trained

X = torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(0))


def branched(settings: BranchSettings) -> torch.nn.Module:
    model = trained(Crn())
    rewrite(model)
    report = branch_layers(model, collect_rows(model, [Batch(args=(X,))], count=64, seed=0), settings)
    assert {layer.name for layer in report if not layer.reason} >= {"out", "rnn.layers.0.ih"}
    return model


def again(packed: PackedModel, change: Any = None) -> PackedModel:
    structure = json.loads(packed.structure.to_json())
    if change is not None:
        change(structure)
    return read_packed(json.dumps(structure), {name: value.clone() for name, value in packed.tensors.items()})


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("form", [{"residual": "int4"}, {"residual": "codebook", "k": 4}])
def test_a_model_with_branches_comes_back(form: dict[str, Any], float16: bool) -> None:
    model = branched(BranchSettings(rank=1, **form))
    packed = pack(model, PackedSettings(float16=float16))
    load_packed(model, packed)
    restored = restore(Crn(), again(packed))
    with torch.no_grad():
        assert torch.equal(restored(X), model(X))
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    assert sum(one.float_bytes for one in packed.report) == model_bytes(model)
    stored = {one.name: one.stored_bytes for one in packed.report}
    for name, module in model.named_modules():
        if isinstance(module, BranchModule):
            assert sum(stored[f"{name}.{key}"] for key in module.tensors()) == sum(
                tensor.nbytes for tensor in module.tensors().values()
            )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda structure: structure["layout"]["branches"]["out"].update(digest="0"), "out"),
        (lambda structure: structure["layout"]["branches"]["out"].update(shape=[48, 17]), "out"),
        (
            lambda structure: structure["layout"]["branches"].update(inner=structure["layout"]["branches"]["out"]),
            "model",
        ),
    ],
)
def test_a_corrupt_branch_is_named(change: Any, field: str) -> None:
    packed = pack(branched(BranchSettings(rank=1)), PackedSettings())
    with pytest.raises(InputError) as caught:
        restore(Crn(), again(packed, change))
    assert caught.value.field == field
    spoilt = dict(packed.tensors) | {"plain/out.left": packed.tensors["plain/out.left"] * 2}
    with pytest.raises(InputError, match=r"^out: it has the digest"):
        restore(Crn(), replace(packed, tensors=spoilt))

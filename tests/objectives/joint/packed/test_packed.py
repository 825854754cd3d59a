"""What is packed comes back bit by bit out of the bare architecture, and its bytes are those of the files."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.packed.packing import (
    ClassClusters,
    PackedModel,
    PackedSettings,
    model_bytes,
    pack,
    read_packed,
)
from alphasmith.objectives.joint.packed.restoring import load_packed, restore, unpack
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.objectives.model.private_copy import private_copy
from alphasmith.storage.files.tensors import read_tensors, write_tensors
from tests.support.joint_models import Crn, trained
from tests.support.packed_models import BATCH, TOKENS, Mixed, made, mixed, mixed_arguments, packed_settings, stages
from tests.support.site_cases import relaxed


def through_files(packed: PackedModel, folder: Path) -> tuple[PackedModel, int]:
    """Written and read again, and the bytes of both files without the header of the tensors."""
    file = folder / "packed.safetensors"
    written = write_tensors(file, packed.tensors)
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    text = packed.structure.to_json()
    return read_packed(text, read_tensors(file)), written.bytes - 8 - header + len(text.encode())


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    """Whether two models have the same tensors, bit by bit, under the same names."""
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].stride() == second[name].stride()
        and torch.equal(bits(first[name]), bits(second[name]))
        for name in first
    )


def bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


@relaxed
@given(mixed_arguments, stages, packed_settings, st.integers(0, 50))
def test_a_model_comes_back_out_of_a_fresh_architecture(
    tmp_path_factory: pytest.TempPathFactory, arguments: Any, stage: Any, settings: PackedSettings, seed: int
) -> None:
    model = made(mixed(seed, **arguments), stage)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = pack(model, settings)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "it was modified"
    again, stored = through_files(packed, tmp_path_factory.mktemp("packed"))
    assert stored == packed.stored_bytes == packed.bytes().total
    load_packed(model, packed)
    torch.manual_seed(seed + 1)
    restored = restore(Mixed(**arguments), again)
    assert same_bits(model, restored)
    with torch.no_grad():
        assert torch.equal(bits(model(TOKENS)), bits(restored(TOKENS)))
    if arguments["tied"]:
        assert restored.get_parameter("out.weight") is restored.get_parameter("embed.weight")


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("fold", [False, True])
def test_the_report_counts_every_tensor_once(fold: bool, form: Any) -> None:
    architecture = trained(Crn())
    batch = replace(BATCH, args=(torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)),))
    model = made(architecture, (True, fold, 2, form), batch)
    packed = pack(model, PackedSettings())
    assert sum(one.float_bytes for one in packed.report) == model_bytes(model)
    parts = packed.bytes()
    assert sum(one.stored_bytes for one in packed.report) == parts.total - parts.structure
    kinds = {one.layer: one.kind for one in packed.report}
    assert kinds["rnn.layers.0.hh"] == "recurrent"
    assert kinds["conv1"] == kinds["decoder"] == "conv"
    assert kinds["out"] == "linear"
    assert kinds["inner"] == "other"
    assert {one.reason for one in packed.report if one.name == "conv1.bias"} == {"it is no matrix"}
    assert packed.structure.layout.folded == (("norm1", "norm2") if fold else ())
    assert "norm1" in dict(architecture.named_modules())
    load_packed(model, packed)
    assert same_bits(model, restore(Crn(), packed))


def test_factors_are_clustered_and_never_their_product() -> None:
    model = made(mixed(own=True), (True, False, 2, "channel"))
    packed = pack(model, PackedSettings(clusters=ClassClusters(conv=4, recurrent=4, linear=4)))
    names = {one.name for one in packed.report}
    assert {"mix.left", "mix.right", "conv.parametrizations.weight.original0"} <= names
    assert names.isdisjoint({"mix.weight", "conv.weight"})
    restored = restore(mixed(seed=3, own=True), packed)
    factor = restored.get_parameter("rnn.layers.0.ih.right")
    assert torch.unique(factor).numel() <= 4
    product = restored.get_parameter("mix.left") @ restored.get_parameter("mix.right")
    assert torch.linalg.matrix_rank(product) == 2


def test_smallest_is_never_larger_than_either_coding() -> None:
    model = mixed()
    sizes = {coding: pack(model, PackedSettings(coding=coding)).bytes() for coding in ("packed", "huffman", "smallest")}
    tensors = {coding: size.total - size.structure for coding, size in sizes.items()}
    assert tensors["smallest"] <= min(tensors["packed"], tensors["huffman"])
    plain = unpack(pack(model, PackedSettings(coding="packed")))
    for name, value in unpack(pack(model, PackedSettings(coding="smallest"))).items():
        assert torch.equal(value, plain[name])


def test_half_precision_is_for_what_it_can_hold() -> None:
    model = mixed()
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(1e5)
        model.get_parameter("norm.bias").fill_(1e-7)
    packed = pack(model, PackedSettings(float16=True))
    stored = {one.name: one.stored for one in packed.report}
    assert (stored["norm.weight"], stored["norm.bias"], stored["inner.bias"]) == ("plain", "plain", "float16")
    assert packed.tensors["codebook/rnn.weight_hh_l0/table"].dtype == torch.float16
    assert packed.stored_bytes < pack(model, PackedSettings()).stored_bytes
    restored = restore(mixed(seed=2), packed)
    assert restored.get_parameter("inner.bias").dtype == torch.float32
    load_packed(model, packed)
    assert same_bits(model, restored)


def test_computed_weights_stay_computed_or_are_baked_as_the_model_was() -> None:
    def architecture() -> nn.Module:
        return nn.Sequential(weight_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 4)).eval()

    torch.manual_seed(0)
    for apart in (False, True):
        model = private_copy(architecture())
        if apart:
            rewrite(model)
        packed = pack(model, PackedSettings(clusters=ClassClusters(linear=4)))
        load_packed(model, packed)
        assert same_bits(model, restore(architecture(), packed))


def test_layouts_of_memory_come_back() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    packed = pack(model, PackedSettings())
    load_packed(model, packed)
    assert not model.get_parameter("0.weight").is_contiguous()
    assert same_bits(model, restore(nn.Sequential(nn.Conv2d(4, 8, 3)), packed))


@pytest.mark.parametrize("k", [1, 0, -3, 1 << 17])
def test_tables_of_impossible_sizes_are_refused(k: int) -> None:
    with pytest.raises(InputError, match=r"clusters\.linear: .* entries make no table; use 2 to 65536"):
        pack(mixed(), PackedSettings(clusters=ClassClusters(linear=k)))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (PackedSettings(coding="zip"), "'zip' is unknown; use one of packed, huffman, smallest"),  # type: ignore[arg-type]
        (PackedSettings(start="best"), "start.*'best'"),  # type: ignore[arg-type]
        (PackedSettings(minimum=-1), r"clusters\.minimum: -1 is negative"),
        (PackedSettings(channels=0), "0 channels share a table"),
        (PackedSettings(iterations=0), "iterations"),
    ],
)
def test_settings_out_of_range_are_refused(settings: PackedSettings, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        pack(mixed(), settings)


def test_more_entries_than_values_are_shrunk_and_noted() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_((torch.arange(64 * 64) % 5).reshape(64, 64) - 2.0)
    packed = pack(model, PackedSettings(clusters=ClassClusters(linear=256)))
    (weight,) = [one for one in packed.report if one.name == "0.weight"]
    assert (weight.requested, weight.entries) == (256, 5)
    assert weight.notes == ("0.weight: 5 distinct values, 256 entries asked for",)
    assert weight.sqnr is None, "nothing is lost"


@pytest.mark.parametrize("name", ["mix.weight", "mix.bias", "norm.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_named(name: str, bad: float) -> None:
    model = mixed()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = bad
    with pytest.raises(NonFiniteError, match=name):
        pack(model, PackedSettings())


def test_what_is_excluded_or_small_stays_float() -> None:
    packed = pack(mixed(), PackedSettings(exclude=("mix", "rnn.weight_hh*"), minimum=200))
    reasons = {one.name: one.reason for one in packed.report}
    assert reasons["mix.weight"] == reasons["rnn.weight_hh_l0"] == "it is excluded"
    assert reasons["embed.weight"] == "it has fewer than 200 elements"
    assert reasons["steps"] == "it is a buffer"
    assert not reasons["rnn.weight_ih_l0"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"width": 8}, r"model: \S+ has shape \S+, \S+ is stored"),
    "kind": ({"rnn": "GRU"}, r"rnn\.layers\.0\.ih\.left has shape 18x2, 24x2 is stored"),
    "groups": ({"groups": 2}, r"conv has 2 groups"),
    "bias": ({"bias": False}, r"has no tensor conv\.bias 12, which is stored"),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_architecture_is_refused_with_tensor_and_shape(name: str) -> None:
    packed = pack(made(mixed(), (True, False, 2, "channel")), PackedSettings())
    arguments, told = WRONG[name]
    with pytest.raises(InputError, match=told) as raised:
        restore(mixed(**arguments), packed)
    assert raised.value.remedy == "pass the architecture that was packed"


def test_a_model_without_the_modules_is_refused() -> None:
    packed = pack(made(mixed(), (True, False, None, "channel")), PackedSettings())
    with pytest.raises(InputError, match="has no rnn that is taken apart"):
        restore(nn.Sequential(nn.Linear(2, 2)), packed)
    plain = pack(mixed(), PackedSettings())
    with pytest.raises(InputError, match=r"has a tensor 0\.weight 2x2, which is not stored"):
        restore(nn.Sequential(nn.Linear(2, 2)), plain)


@pytest.mark.parametrize("part", ["table", "indices", "sizes"])
def test_a_changed_codebook_is_named_with_its_digest(part: str) -> None:
    packed = pack(mixed(), PackedSettings())
    name = "rnn.weight_ih_l0"
    key = f"codebook/{name}/{part}"
    changed = packed.tensors[key].clone()
    changed.view(torch.uint8)[0] ^= 1
    broken = replace(packed, tensors={**packed.tensors, key: changed})
    with pytest.raises(InputError, match=rf"{name}: its codebook has the digest") as raised:
        restore(mixed(), broken)
    assert packed.structure.codebooks[name].digest in str(raised.value)
    missing = replace(packed, tensors={k: v for k, v in packed.tensors.items() if k != key})
    with pytest.raises(InputError, match=rf"{name}: its codebook holds .*, not "):
        restore(mixed(), missing)


def test_tensors_that_are_gone_or_nobody_names_are_refused() -> None:
    packed = pack(mixed(), PackedSettings())
    gone = replace(packed, tensors={k: v for k, v in packed.tensors.items() if k != "plain/mix.bias"})
    with pytest.raises(InputError, match=r"has a tensor mix\.bias 12, which is not stored"):
        restore(mixed(), gone)
    for key in ("other", "plain/", "codebook/none/table"):
        more = replace(packed, tensors={**packed.tensors, key: torch.zeros(1)})
        with pytest.raises(InputError, match="does not name"):
            restore(mixed(), more)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 2}', '{"more": 1}', '{"codebooks": {"a": {}}}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="describes no packed model"):
        read_packed(text, {})


def test_the_json_leaves_out_what_is_usual() -> None:
    packed = pack(nn.Sequential(nn.Linear(4, 4)), PackedSettings())
    assert json.loads(packed.structure.to_json()) == {}

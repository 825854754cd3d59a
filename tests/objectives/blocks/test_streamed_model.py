"""A model read block by block computes what the whole model computes, to the bit, and holds one part at a time."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphasmith.objectives.blocks._chain import find_blocks
from alphasmith.objectives.blocks.parts import around_batch
from alphasmith.objectives.blocks.streamed_model import Start, StreamedModel
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.model.loading import load_model
from tests.support.run_cases import LENGTH, VOCABULARY, Mlp
from tests.support.streamed_models import WITH_BLOCKS, WITHOUT_BLOCKS, deep_llama, saved

CPU = torch.device("cpu")


def ids(samples: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (samples, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, LENGTH // 2 :] = 0
    return Batch(kwargs={"input_ids": tokens, "attention_mask": mask}, mask=mask.bool())


@torch.no_grad()
def streamed_output(streamed: StreamedModel, batch: Batch) -> Tensor:
    """What the parts make of a batch, one after the other."""
    with streamed.around(CPU) as model:
        start = streamed.start(model, batch)
    hidden = start.hidden
    for number in range(streamed.blocks):
        with streamed.block(number, CPU) as block:
            hidden = call(block, streamed.batch(number, batch, Start(hidden, start.leaves)))
    with streamed.around(CPU) as model:
        return main_output(call(model, around_batch(batch, hidden)))


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_parts_in_turn_compute_what_the_model_computes(name: str, tmp_path: Path) -> None:
    streamed = StreamedModel(saved(WITH_BLOCKS[name](), tmp_path))
    streamed.check(ids().narrow(0, 2), CPU)
    whole = load_model(path=tmp_path)
    for samples, seed in (
        (3, 1),
        (LENGTH, 2),
        (1, 3),
    ):  # as many samples as places, too: what is of the samples stays so
        batch = ids(samples, seed)
        with torch.no_grad():
            expected = main_output(call(whole.model, batch))
        assert torch.equal(streamed_output(streamed, batch), expected)


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.bfloat16), ("tied llama", torch.float32)])
def test_it_tells_of_the_model_what_loading_it_tells(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(WITH_BLOCKS[name](), tmp_path, dtype)
    found, expected = StreamedModel(folder).loaded(), load_model(path=folder)
    assert found.digest == expected.digest
    assert (found.parameter_count, dict(found.types)) == (expected.parameter_count, dict(expected.types))
    assert (found.kind, found.folder, found.processors) == (expected.kind, expected.folder, expected.processors)


def test_names_of_the_parts_are_those_of_the_model_and_each_is_in_one_part(tmp_path: Path) -> None:
    streamed = StreamedModel(saved(deep_llama(), tmp_path))
    streamed.check(ids().narrow(0, 2), CPU)
    names: list[str] = []
    for number in range(streamed.blocks):
        with streamed.block(number, CPU) as block:
            names += list(dict(block.named_parameters()))
    with streamed.around(CPU) as model:
        names += list(dict(model.named_parameters()))
    assert sorted(names) == sorted(dict(load_model(path=tmp_path).model.named_parameters()))


def test_no_weight_is_in_memory_outside_and_none_that_was_changed_comes_back(tmp_path: Path) -> None:
    streamed = StreamedModel(saved(deep_llama(), tmp_path))
    streamed.check(ids().narrow(0, 2), CPU)
    with streamed.block(1, CPU) as block, torch.no_grad():
        kept = copy.deepcopy(block.state_dict())
        for parameter in block.parameters():
            parameter.zero_()
    assert all(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in streamed.whole().parameters())
    with streamed.block(1, CPU) as block:
        found = block.state_dict()
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept)


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
def test_a_model_without_alike_blocks_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no list of blocks of one class"):
        StreamedModel(saved(WITHOUT_BLOCKS[name](), tmp_path))


def test_a_checkpoint_of_other_names_is_refused(tmp_path: Path) -> None:
    folder = saved(deep_llama(), tmp_path)
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): value.clone() for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match="does not store"):
        StreamedModel(folder)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = saved(deep_llama(), tmp_path)
    file = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        StreamedModel(folder).loaded()


class Crossed(nn.Module):
    """Blocks of one class, the second of which is not fed with what the first returned."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(2))


def test_blocks_are_the_list_with_the_most_parameters_of_those_in_no_other(tmp_path: Path) -> None:
    inner = Crossed()
    outer = nn.Module()
    outer.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    outer.layers = nn.ModuleList([inner, copy.deepcopy(inner)])
    assert find_blocks(outer) == "layers"
    assert find_blocks(inner) == "blocks"
    assert find_blocks(Mlp()) is None
    twice = nn.Linear(2, 2)
    assert find_blocks(nn.Sequential(nn.ModuleList([twice, twice]))) is None, (
        "one block used twice is none that can be folded by itself"
    )


def test_blocks_that_are_no_chain_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    streamed = StreamedModel(saved(deep_llama(), tmp_path))
    plain = LlamaModel.forward

    def doubled(self: LlamaModel, *args: object, **kwargs: object) -> object:
        first = self.layers[0]
        handle = first.register_forward_hook(lambda _m, _a, output: output * 2.0)
        try:
            return plain(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(LlamaModel, "forward", doubled)
    with pytest.raises(InputError, match="block 1 is not called with what the one before returned"):
        streamed.check(ids().narrow(0, 2), CPU)

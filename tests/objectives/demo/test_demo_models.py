"""The embedded demos: outliers that leave the function alone, a cache that is safe, models that need smoothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alphasmith.objectives.demo import (
    DemoTask,
    NormPair,
    find_pairs,
    load_demo,
    with_outliers,
    write_hf_folder,
    write_media,
)
from alphasmith.objectives.demo import _images as images
from alphasmith.objectives.demo import _text as text
from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.media import MediaSource, data_digest, load_media
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.model.loading import load_model, parameters_digest

CHANNELS = 40


class Block(nn.Module):
    """A norm read by two linears."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(CHANNELS, 8), nn.Linear(CHANNELS, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return torch.as_tensor(self.a(h) * self.b(h))


def block(seed: int, dtype: torch.dtype, rms: bool = False) -> Block:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Block(nn.RMSNorm(CHANNELS) if rms else nn.LayerNorm(CHANNELS))
        for parameter in made.norm.parameters():
            nn.init.normal_(parameter)
    return made.to(dtype)


PAIR = NormPair(norm="norm", consumers=("a", "b"))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), share=st.floats(0.001, 1.0), rms=st.booleans())
def test_outliers_leave_the_function_alone(seed: int, share: float, rms: bool) -> None:
    model = block(seed, torch.float64, rms)
    before = parameters_digest(model)
    x = torch.randn(6, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    changed, (edit,) = with_outliers(model, [PAIR], share=share, seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(changed(x), model(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(changed.float()(x.float()), model(x).float(), rtol=1e-3, atol=1e-4)
    assert parameters_digest(model) == before
    assert len(edit.channels) == max(1, round(share * CHANNELS)) == len(set(edit.channels))
    assert all(20 <= gain <= 60 for gain in edit.gains)
    assert with_outliers(model, [PAIR], share=share, seed=seed)[1] == (edit,)


def test_outliers_are_where_the_report_says() -> None:
    model = block(1, torch.float64)
    changed, (edit,) = with_outliers(model, [PAIR], share=0.05, seed=2)
    x = torch.randn(50, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratio = changed.get_submodule("norm")(x).abs().amax(0) / model.norm(x).abs().amax(0)
    expected = torch.ones(CHANNELS, dtype=torch.float64)
    expected[list(edit.channels)] = torch.tensor(edit.gains, dtype=torch.float64)
    torch.testing.assert_close(ratio, expected)


def test_offset_norms_and_the_largest_channels() -> None:
    absmax = torch.rand(CHANNELS, generator=torch.Generator().manual_seed(3))
    pair = NormPair(norm="norm", consumers=("a", "b"), offset=1.0, absmax=absmax)
    model = block(4, torch.float64, rms=True)
    changed, (edit,) = with_outliers(model, [pair], share=0.1)
    assert set(edit.channels) == set(absmax.topk(4).indices.tolist())
    gain = (changed.get_parameter("norm.weight") + 1) / (model.get_parameter("norm.weight") + 1)
    torch.testing.assert_close(gain[list(edit.channels)], torch.tensor(edit.gains, dtype=torch.float64))


def test_pairs_are_found_by_the_tensor_they_share() -> None:
    model = block(0, torch.float32)
    x = torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(0))
    (pair,) = find_pairs(model, ["norm"], Batch(args=(x,)))
    assert (pair.norm, pair.consumers) == ("norm", ("a", "b"))
    assert pair.absmax is not None
    torch.testing.assert_close(pair.absmax, model.norm(x).abs().amax(0))
    assert not model.norm._forward_hooks  # nothing is left behind
    with pytest.raises(InputError, match="no module other"):
        find_pairs(model, ["other"], Batch(args=(x,)))
    with pytest.raises(InputError, match="no linear reads"):
        find_pairs(nn.Sequential(nn.LayerNorm(CHANNELS), nn.ReLU()), ["0"], Batch(args=(x,)))


@pytest.mark.parametrize(
    ("pair", "share", "gains", "named"),
    [
        (PAIR, 0.0, (20.0, 60.0), "share"),
        (PAIR, 0.1, (60.0, 20.0), "gains"),
        (NormPair(norm="a", consumers=("b",)), 0.1, (20.0, 60.0), "no norm"),
        (NormPair(norm="none", consumers=("b",)), 0.1, (20.0, 60.0), "no norm"),
        (NormPair(norm="norm", consumers=("norm",)), 0.1, (20.0, 60.0), "no nn.Linear"),
    ],
)
def test_outliers_refuse(pair: NormPair, share: float, gains: tuple[float, float], named: str) -> None:
    with pytest.raises(InputError, match=named):
        with_outliers(block(0, torch.float32), [pair], share=share, gains=gains)


# ----------------------------------------------------------------------------------------------------- short-trained demos


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


TOPICS = text._topics()[:20]


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Three training steps, and a part of the text."""
    patch.setattr(images, "_STEPS", 3)
    patch.setattr(text, "_STEPS", 3)
    patch.setattr(text, "_topics", lambda: TOPICS)


@pytest.fixture(scope="module", params=["image", "text"])
def task(request: pytest.FixtureRequest, cache: Path) -> DemoTask:
    """A demo trained for a few steps: everything but its quality."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return load_demo(request.param, 5, cache)


def inputs(task: DemoTask, batches: tuple[Batch, ...]) -> set[bytes]:
    name = "pixel_values" if task.name == "image" else "input_ids"
    return {row.numpy().tobytes() for batch in batches for row in batch.kwargs[name]}


def test_demo_states_what_it_is(task: DemoTask) -> None:
    assert "synthetic" in task.description
    assert len(task.outliers) == 8  # two norms in each of four layers
    assert not task.model.training
    assert task.higher_is_better == (task.metric_name == "accuracy")
    splits = [inputs(task, split) for split in (task.calibration, task.tuning, task.held_out, task.proof)]
    assert all(splits)
    assert len(set().union(*splits)) == sum(len(split) for split in splits), "no sample in two of them"


def test_demo_splits_do_not_depend_on_the_seed_and_the_cache_is_used(
    task: DemoTask, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    steps: list[tuple[int, int]] = []
    state = torch.get_rng_state()
    again = load_demo(task.name, 5, cache, progress=lambda i, n: steps.append((i, n)))  # type: ignore[arg-type]
    assert steps == []
    assert parameters_digest(again.model) == parameters_digest(task.model)
    assert again.metric(again.model) == task.metric(task.model)
    other = load_demo(task.name, 6, cache, progress=lambda i, n: steps.append((i, n)))  # type: ignore[arg-type]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert parameters_digest(other.model) != parameters_digest(task.model)
    assert data_digest(other.calibration) == data_digest(task.calibration)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left as it was"


def test_demo_training_is_reproducible(task: DemoTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    fresh = load_demo(task.name, 5, tmp_path)  # type: ignore[arg-type]
    assert parameters_digest(fresh.model) == parameters_digest(task.model)


@pytest.mark.parametrize("damage", ["content", "folder"])
def test_an_unusable_cache_costs_only_time(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images, "_STEPS", 1)
    folder = tmp_path / "cache"
    if damage == "folder":
        folder.write_text("a file where the folder should be")
        first = load_demo("image", 0, folder)
        assert "not cached" in caplog.text
    else:
        first = load_demo("image", 0, folder)
        (file,) = folder.iterdir()
        file.write_bytes(b"damaged")
    again = load_demo("image", 0, folder)
    assert ("trained again" in caplog.text) == (damage == "content")
    assert parameters_digest(again.model) == parameters_digest(first.model)


def test_demo_as_a_folder_and_files(task: DemoTask, tmp_path: Path) -> None:
    folder = write_hf_folder(task, tmp_path / "model")
    loaded = load_model(path=folder)
    assert loaded.digest == parameters_digest(task.model)
    assert loaded.unexpected == ()
    assert task.metric(loaded.model) == pytest.approx(task.metric(task.model), rel=1e-6)
    media = write_media(task, tmp_path / "media")
    read = load_media(
        MediaSource(path=media, samples=999, max_length=64), model_folder=folder, model_config=loaded.config
    )
    wanted = inputs(task, (*task.calibration, *task.tuning, *task.held_out, *task.proof))
    if task.name == "image":
        assert read.notes == ()
        found = {
            ((x * 0.5 + 0.5) * 255).round().byte().numpy().tobytes() for b in read for x in b.kwargs["pixel_values"]
        }
        batches = (*task.calibration, *task.tuning, *task.held_out, *task.proof)
        assert found == {
            ((x * 0.5 + 0.5) * 255).round().byte().numpy().tobytes() for b in batches for x in b.kwargs["pixel_values"]
        }
    else:
        assert read.samples == len(wanted)
        kept = inputs(task, tuple(read)) & wanted
        assert len(kept) > 0.4 * len(wanted)  # cut words are tokenized anew; the rest come back token by token
    for write in (write_hf_folder, write_media):
        with pytest.raises(InputError, match="not empty"):
            write(task, folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be made"):
        write_media(task, tmp_path / "file" / "below")


def test_metrics_refuse_models_that_have_gone_wrong(task: DemoTask) -> None:
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    if task.name == "text":
        with pytest.raises(NonFiniteError, match="perplexity"):
            task.metric(model)
    else:
        assert task.metric(model) < 0.2


def test_unknown_demos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image or text"):
        load_demo("sound", cache_dir=tmp_path)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- full quality


def naive(task: DemoTask, alpha: float | None = None) -> nn.Module:
    """Static per-tensor int8 inputs, per-channel int8 weights, abs-max, in plain torch: an independent reference."""
    model = copy.deepcopy(task.model)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    seen: dict[int, torch.Tensor] = {}

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        peak = args[0].flatten(0, -2).abs().amax(0)
        seen[id(module)] = torch.maximum(seen.get(id(module), peak), peak)

    handles = [m.register_forward_pre_hook(watch) for m in linears]
    with torch.no_grad():
        for batch in task.calibration:
            main_output(call(model, batch))
    for handle in handles:
        handle.remove()
    for module in linears:
        a, w = seen[id(module)].clamp_min(1e-5), module.weight.abs().amax(0).clamp_min(1e-5)
        s = torch.ones_like(a) if alpha is None else a**alpha / w ** (1 - alpha)
        step = (a / s).max() / 127
        weight = module.weight * s
        size = weight.abs().amax(1, keepdim=True) / 127
        module.weight.data = (weight / size).round() * size

        def quantize(_module: nn.Module, args: tuple[torch.Tensor, ...], s: torch.Tensor = s, d: torch.Tensor = step):  # type: ignore[no-untyped-def]
            return ((args[0] / s / d).round().clamp(-127, 127) * d,)

        module.register_forward_pre_hook(quantize)
    return model


@pytest.mark.slow
def test_image_demo_is_good_and_needs_smoothing(tmp_path: Path) -> None:
    task = load_demo("image", 0, tmp_path)
    accuracy = task.metric(task.model)
    assert accuracy >= 0.95
    assert task.metric(naive(task)) <= accuracy - 0.05
    assert task.metric(naive(task, 0.5)) >= accuracy - 0.01


@pytest.mark.slow
def test_text_demo_is_good_and_needs_smoothing(tmp_path: Path) -> None:
    task = load_demo("text", 0, tmp_path)
    perplexity = task.metric(task.model)
    assert perplexity < 30  # 512 for a model that knows nothing
    assert task.metric(naive(task)) >= 1.1 * perplexity
    assert task.metric(naive(task, 0.5)) <= 1.02 * perplexity

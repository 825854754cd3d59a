"""Data as people have them: arrays, frames and loaders are taken or refused in one line, never with another's traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alphasmith.objectives.errors import InputError
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.preparation import survey
from alphasmith.search.inputs.task import Task, load_task

SAMPLES, WIDTH = 48, 6
X = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SAMPLES) % 3
FRAME = pd.DataFrame(X.numpy())
CUTS = [slice(start, start + 8) for start in range(0, SAMPLES, 8)]


class Scaled(nn.Module):
    """Takes an optional second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, WIDTH) -> (B, 3)."""
        assert x.dim() == 2
        return torch.as_tensor(self.linear(x if scale is None else x * scale))


class Named(Scaled):
    """Takes keyword arguments only."""

    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, WIDTH) -> (B, 3)."""
        return super().forward(x)


class Any_(Scaled):
    """Takes any number of arguments."""

    def forward(self, *arguments: Tensor) -> Tensor:  # type: ignore[override]
        """(B, WIDTH), (B, WIDTH) -> (B, 3)."""
        return super().forward(*arguments)


def linear() -> nn.Module:
    """Takes one argument."""
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 3))


def taken(batches: Any, model: nn.Module | None = None) -> Task:
    """Model and data of a run, after the first call of the model."""
    config = RunConfig()
    task = load_task(config, model=linear() if model is None else model, batches=batches)
    survey(config, task)
    return task


def inputs(task: Task) -> list[list[float]]:
    """Every sample of every split, sorted."""
    splits = (*task.calibration, *task.tuning, *task.held_out, *task.proof)
    return sorted(row for b in splits for value in (*b.args, *b.kwargs.values()) for row in value.tolist())


def labels(task: Task) -> list[int]:
    """The labels of every sample, sorted."""
    splits = (*task.calibration, *task.tuning, *task.held_out, *task.proof)
    return sorted(row for b in splits if b.labels is not None for row in b.labels.tolist())


def read_only() -> Any:
    array = X.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "batches",
    [
        X.double(),
        X.to_sparse(),
        X.clone().requires_grad_(),
        X.numpy(),
        X.double().numpy(),
        X.numpy().astype(">f8"),
        X.numpy()[::-1],
        read_only(),
        FRAME,
        FRAME.astype("float64"),
        list(X.split(8)),
        X.split(8),
        [X.numpy()[cut] for cut in CUTS],
        [FRAME[cut] for cut in CUTS],
        [[X[cut]] for cut in CUTS],
        DataLoader(X, batch_size=8),  # type: ignore[arg-type]
        DataLoader(TensorDataset(X), batch_size=8, shuffle=True),
        {"input": X},
        [{"input": X.numpy()[cut]} for cut in CUTS],
        [{"input": FRAME[cut]} for cut in CUTS],
    ],
)
@pytest.mark.filterwarnings("error")
def test_inputs_in_every_form_are_the_same_samples(batches: Any) -> None:
    assert inputs(taken(batches)) == sorted(X.tolist())


def test_a_stream_is_taken() -> None:
    assert inputs(taken(X[cut] for cut in CUTS)) == sorted(X.tolist())


@pytest.mark.parametrize(
    "batches",
    [
        DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True),
        [(X[cut], Y[cut]) for cut in CUTS],
        [(X.numpy()[cut], Y.numpy()[cut]) for cut in CUTS],
        [(FRAME[cut], pd.Series(Y.numpy())[cut]) for cut in CUTS],
        [(X[cut], Y[cut].tolist()) for cut in CUTS],
        [{"input": X[cut], "labels": Y[cut]} for cut in CUTS],
    ],
)
def test_labels_are_kept_apart(batches: Any) -> None:
    task = taken(batches)
    assert inputs(task) == sorted(X.tolist())
    assert labels(task) == sorted(Y.tolist())


def test_a_tuple_is_arguments_as_far_as_the_model_takes_them() -> None:
    scale = torch.full((SAMPLES, WIDTH), 2.0)
    for model in (Scaled(), Any_()):
        both = taken([(X, scale)], model)
        assert [len(b.args) for b in both.calibration] == [2] * len(both.calibration)
        assert labels(both) == []
    assert labels(taken([(X, scale, Y)], Scaled())) == sorted(Y.tolist())
    assert inputs(taken([{"x": X}], Named())) == sorted(X.tolist())


class Lossy(Scaled):
    """Computes its own loss where it is given labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, WIDTH) -> (B, 3)."""
        assert labels is None
        return super().forward(x)


PIXELS = torch.rand(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(2))
IDS = torch.randint(0, 20, (SAMPLES, 7), generator=torch.Generator().manual_seed(2))


def transformers_classifiers() -> tuple[nn.Module, nn.Module]:
    """One of images, one of texts; of the second, the argument behind the first is no label."""
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    images = ViTConfig(**small, intermediate_size=8, image_size=8, patch_size=4)
    texts = BertConfig(**small, intermediate_size=8, vocab_size=20, max_position_embeddings=8)
    return ViTForImageClassification(images), BertForSequenceClassification(texts)


def test_labels_behind_optional_arguments_are_told() -> None:
    images, texts = transformers_classifiers()
    for given, model, x in ((X, Lossy(), X), (PIXELS, images, PIXELS), (IDS, texts, IDS)):
        task = taken(DataLoader(TensorDataset(given, Y), batch_size=8), model)
        assert labels(task) == sorted(Y.tolist())
        assert {len(batch.args) for batch in task.calibration} == {1}
        assert (None if task.metric is None else task.metric.name) == (None if isinstance(model, Lossy) else "accuracy")
        assert sum(batch.size for batch in task.calibration) > 0
        assert x.shape[1:] == task.calibration[0].args[0].shape[1:]
    assert labels(taken([{"pixel_values": PIXELS, "label": Y}], images)) == sorted(Y.tolist())
    masked = taken([(IDS, torch.ones_like(IDS))], texts)
    assert labels(masked) == []
    assert {len(batch.args) for batch in masked.calibration} == {2}


@pytest.mark.parametrize(
    ("batches", "field", "words"),
    [
        (X.numpy().astype(object), "batches[0]", "numeric columns"),
        (X.numpy().astype(str), "batches[0]", "numeric columns"),
        (X.numpy() + 1j, "batches[0]", "array of numbers"),
        (X + 1j, "batches[0]", "give real ones"),
        (FRAME.assign(name="a"), "batches[0]", "numeric columns"),
        (FRAME.assign(day=pd.Timestamp("2020-01-01")), "batches[0]", "numeric columns"),
        (FRAME.astype("Float64").mask(FRAME > 1), "batches[0]", "numeric columns"),
        (FRAME.mask(FRAME > 1), "batches[0] argument 0", "clean the data"),
        (FRAME[:0], "batches[0] argument 0", "at least one sample"),
        (np.zeros((0, WIDTH)), "batches[0] argument 0", "at least one sample"),
        (np.array(3.0), "batches[0]", "input tensors"),
        (np.float64(3.0), "batches", "DataLoader"),
        (X.numpy()[:, 0], "data", "samples first"),
        (X[:, :4], "data", "samples first"),
        ((X * 10).long(), "data", "float32"),
        (TensorDataset(X, Y), "batches", "DataLoader(dataset, batch_size=32)"),
        ([(X[i], int(Y[i])) for i in range(SAMPLES)], "data", "samples first"),
        ([(X, Y, Y)], "data", "what its forward takes"),
        ([(X, Y[:3])], "labels of batches[0]", "first dimension"),
        ([(X, ["cat"] * SAMPLES)], "labels of batches[0]", "array of numbers"),
        ([{"x": X}], "data", "what its forward takes"),
        ([{"input": X.tolist()}], "batches[0]", "input tensors"),
        (X.tolist(), "batches[0]", "input tensors"),
        (X[0].tolist(), "batches[0]", "give a tensor"),
        ([None], "batches[0]", "give a tensor"),
        ([((X,),)], "batches[0]", "input tensors"),
        ([], "batches", "give at least"),
        (iter(()), "batches", "give at least"),
        (5, "batches", "DataLoader"),
        ("texts.jsonl", "batches", "DataLoader"),
        (Path("texts.jsonl"), "batches", "DataLoader"),
        (b"abc", "batches", "DataLoader"),
        (object(), "batches", "DataLoader"),
        (lambda: X, "batches", "DataLoader"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(batches: Any, field: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        taken(batches)
    assert caught.value.field == field
    assert words in caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear, "is a type; give an nn.Module: an instance"),
        ("folder", "is a str; give an nn.Module: an instance"),
        (Path("nothing"), "give an nn.Module: an instance"),
        (linear().state_dict(), "is a OrderedDict; give an nn.Module: an instance"),
        (X.numpy(), "is a ndarray; give an nn.Module: an instance"),
        (nn.ReLU(), "has no parameters"),
        (nn.Sequential(nn.LazyLinear(3)), "call it once"),
    ],
)
def test_a_model_that_is_none_is_refused_in_one_line(model: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        taken(X, model)
    assert caught.value.field == "model"


def test_a_compiled_model_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="jit"), pytest.raises(InputError, match="TorchScript module"):
        taken(X, torch.jit.script(linear()))


@pytest.mark.parametrize("forward", [lambda _, x: "text", lambda _, x: None, lambda self, x: self.linear(x).argmax(-1)])
def test_a_model_without_a_floating_answer_is_refused(forward: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="holds no floating tensor"):
        taken(X, type("Silent", (Scaled,), {"forward": forward})())


def test_an_assertion_of_the_model_is_about_the_data() -> None:
    with pytest.raises(InputError, match="AssertionError"):
        taken(X[:, None], Scaled())


def scored(metric: Any) -> float:
    """The float model's metric."""
    task = load_task(RunConfig(), model=linear(), batches=X, metric=metric)
    assert task.metric is not None
    return task.metric.score(task.loaded.model)


@pytest.mark.parametrize("metric", [0.5, lambda _: "good", lambda _: None, lambda _: np.zeros(3)])
def test_a_metric_that_gives_no_number_is_refused(metric: Any) -> None:
    with pytest.raises(InputError, match=r"^metric: .*(function|number)"):
        scored(metric)


def test_a_function_of_the_user_may_give_labels_too(tmp_path: Path) -> None:
    (tmp_path / "labelled.py").write_text(
        "import torch\nfrom torch import nn\ndef model():\n    return nn.Linear(6, 3)\n"
        "def batches():\n    return [(torch.randn(48, 6), torch.arange(48))]\n"
    )
    model = {"factory": "labelled:model", "factory_path": tmp_path}
    task = load_task(RunConfig(model=model, data={"factory": "labelled:batches"}))
    assert labels(task) == list(range(48))

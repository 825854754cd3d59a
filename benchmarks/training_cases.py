"""Shared models that are trained: their data in parts that do not overlap, and the metric that judges."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.training.settings import TrainingSettings


@dataclass(frozen=True, eq=False)
class TensorSamples:
    """Samples in one tensor, with labels where there are any."""

    inputs: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some of them, as the models here take them."""
        places = torch.as_tensor(list(numbers))
        return Batch(args=(self.inputs[places],), labels=None if self.labels is None else self.labels[places])


@dataclass(frozen=True, eq=False)
class TextSamples:
    """Token ids of different lengths, filled up behind to the longest of a batch."""

    ids: Sequence[Tensor]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some of them."""
        chosen = [self.ids[number] for number in numbers]
        filled = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        mask = torch.arange(filled.shape[1])[None] < torch.tensor([len(ids) for ids in chosen])[:, None]
        given = {"input_ids": filled, "attention_mask": mask.long()}
        labels = None if self.labels is None else self.labels[torch.as_tensor(list(numbers))]
        return Batch(kwargs=given, mask=mask, labels=labels)


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """A model, its data in parts, and its metric on data that nothing else saw.

    Attributes:
        name: Folder of the model.
        model: The float model.
        calibration: What the search sees.
        train: What is trained on.
        held_out: What decides what is kept.
        metric: Of a model, on the judged data.
        metric_name: What it is called.
        higher_is_better: Whether larger is better.
        data: Which data are in which part, in words.
        settings: How it is trained.
    """

    name: str
    model: nn.Module
    calibration: list[Any]
    train: TensorSamples | TextSamples
    held_out: TensorSamples | TextSamples
    metric: Callable[[nn.Module], float]
    metric_name: str
    higher_is_better: bool
    data: str
    settings: TrainingSettings


#: Labels, and mostly the distance from the float model, whose answers say more than a label.
CLASSES = TrainingSettings(learning_rate=1e-3, steps=300, batch_size=32, distill=0.9, evaluate_every=50, patience=0)
TOKENS = TrainingSettings(learning_rate=2e-3, steps=300, batch_size=8, distill=0.5, evaluate_every=50, patience=0)
VALUES = TrainingSettings(
    learning_rate=2e-3, steps=300, batch_size=8, loss="mse", distill=1.0, evaluate_every=50, patience=0
)


def load_case(name: str, data: Path, home: Path) -> Case:
    """One of :data:`NAMES`.

    Args:
        name: Folder of the shared data, or MiniLM.
        data: The shared data.
        home: Where models out of packages are kept.
    """
    return _MAKERS[name](name, data, home)


def zoo_model(name: str, data: Path) -> tuple[nn.Module, dict[str, Any], Any, Any]:
    """A shared model, its configuration, and the shared evaluation with its context.

    Args:
        name: Its folder.
        data: The shared data, whose modules can be imported.
    """
    zoo, zoo_eval = (importlib.import_module(module) for module in ("zoo", "zoo_eval"))
    model, config = zoo.load_model(str(data / name))
    return model, config, zoo_eval, zoo_eval.context(str(data / name))


def parts_by_class(labels: Tensor, shares: Sequence[int]) -> list[Tensor]:
    """Numbers of samples in parts, each with as many of every class as ``shares`` says.

    Args:
        labels: (N,) classes.
        shares: Samples of every class in each part.
    """
    generator = torch.Generator().manual_seed(0)
    parts: list[list[Tensor]] = [[] for _ in shares]
    for label in labels.unique():
        places = torch.nonzero(labels == label)[:, 0]
        places = places[torch.randperm(len(places), generator=generator)]
        for part, taken in zip(parts, places[: sum(shares)].split(list(shares)), strict=True):
            part.append(taken)
    return [torch.cat(part).sort().values for part in parts]


def _accuracy(inputs: Tensor, labels: Tensor) -> Callable[[nn.Module], float]:
    def metric(model: nn.Module) -> float:
        with torch.no_grad():
            found = torch.cat([main_output(model(part)).argmax(-1) for part in inputs.split(100)])
        return float((found == labels).double().mean())

    return metric


def _split_classes(name: str, data: Path, _: Path) -> Case:
    """kwt1 and mobilenet_vww: one labelled set, cut in three by class."""
    model, _config, evaluation, context = zoo_model(name, data)
    task = evaluation.Keywords if name == "kwt1" else evaluation.Person
    inputs, labels = task.load(context)
    shares = (22, 10, 18) if name == "kwt1" else (90, 40, 70)
    train, held_out, judged = parts_by_class(labels, shares)
    told = " / ".join(str(len(part)) for part in (train, held_out, judged))
    return Case(
        name=name, model=model, calibration=[(inputs[train][::3],)],
        train=TensorSamples(inputs[train], labels[train]), held_out=TensorSamples(inputs[held_out], labels[held_out]),
        metric=_accuracy(inputs[judged], labels[judged]), metric_name="accuracy", higher_is_better=True,
        data=f"the shared evaluation set, cut by class into {told}", settings=replace(CLASSES, learning_rate=3e-4, batch_size=16),
    )  # fmt: skip


def _cifar(name: str, data: Path, _: Path) -> Case:
    model, _config, evaluation, context = zoo_model(name, data)
    inputs, labels = evaluation.Cifar.load(context, "cifar10_jpeg1000")
    judged, classes = evaluation.Cifar.load(context, "cifar10_test200")
    train, held_out = parts_by_class(labels, (70, 30))
    return Case(
        name=name, model=model, calibration=[(inputs[train][::3],)],
        train=TensorSamples(inputs[train], labels[train]), held_out=TensorSamples(inputs[held_out], labels[held_out]),
        metric=_accuracy(judged, classes), metric_name="accuracy", higher_is_better=True,
        data="cifar10_jpeg1000 cut by class into 700 / 300; judged on the 200 of cifar10_test200",
        settings=CLASSES,
    )  # fmt: skip


def _shakespeare(name: str, data: Path, _: Path) -> Case:
    model, _config, evaluation, context = zoo_model(name, data)
    ids = evaluation.Chars.ids(context)
    before = ids[: -64 * 513]
    windows = before[: len(before) // 129 * 129].reshape(-1, 129)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    train, held_out = windows[order[:1200]], windows[order[1200:1264]]

    def metric(trained: nn.Module) -> float:
        with torch.no_grad():
            return float(evaluation.Chars.metric(trained, context)["bits_per_char"])

    return Case(
        name=name, model=model, calibration=[(train[:32, :128],)],
        train=TensorSamples(train), held_out=TensorSamples(held_out),
        metric=metric, metric_name="bits per character", higher_is_better=False,
        data="windows of 129 characters, 1200 / 64; judged on the last 64 x 513 characters, which are in neither",
        settings=replace(TOKENS, learning_rate=3e-3),
    )  # fmt: skip


def _stories(name: str, data: Path, _: Path) -> Case:
    model, config, evaluation, context = zoo_model(name, data)
    eager: Any = getattr(model, "set_attn_implementation", None)
    if eager is not None:
        eager("eager")
    texts = [part.strip() for part in evaluation.text(context, "tinystories_sample.txt").split("<|endoftext|>")][:-1]
    longest = min(160, config["max_position_embeddings"])
    ids = [found[0] for found in evaluation.hf_ids(str(data / name), texts[130:1000], longest)]

    def metric(trained: nn.Module) -> float:
        with torch.no_grad():
            return float(evaluation.Llama.metric(trained, context)["perplexity"])

    return Case(
        name=name, model=model, calibration=evaluation.calib_batches(str(data / name)),
        train=TextSamples(ids[:800]), held_out=TextSamples(ids[800:]),
        metric=metric, metric_name="perplexity", higher_is_better=False,
        data="TinyStories 130 to 930 / 930 to 1000, 160 tokens at most; judged on stories 0 to 100",
        settings=TOKENS,
    )  # fmt: skip


def _dtln(name: str, data: Path, _: Path) -> Case:
    model, _config, evaluation, context = zoo_model(name, data)
    pairs = list(evaluation.speech_pairs(context))
    names = [pair[0] for pair in pairs]
    length = 16_000
    crops = [x[start : start + length] for _, _, x in pairs[:4] for start in range(0, len(x) - length, length // 2)]
    waves = torch.stack(crops)
    order = torch.randperm(len(waves), generator=torch.Generator().manual_seed(0))
    held = max(8, len(waves) // 5)
    train, held_out = waves[order[held:]], waves[order[:held]]

    def metric(trained: nn.Module) -> float:
        with torch.no_grad():
            found = [evaluation.si_sdr(clean, trained(noisy[None])[0]) for _, clean, noisy in pairs[4:]]
        return float(np.mean(found))

    return Case(
        name=name, model=model, calibration=[(train[::3],)],
        train=TensorSamples(train), held_out=TensorSamples(held_out),
        metric=metric, metric_name="SI-SDR [dB]", higher_is_better=True,
        data=f"crops of 1 s of {', '.join(names[:4])}, {len(train)} / {len(held_out)}, no labels; judged on {', '.join(names[4:])}",
        settings=VALUES,
    )  # fmt: skip


class SentimentModel(nn.Module):
    """MiniLM, the mean of its last states over real positions, and one linear layer of two classes."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, width)."""
        states = main_output(self.encoder(input_ids=input_ids, attention_mask=attention_mask))
        real = attention_mask[..., None].to(states.dtype)
        return torch.as_tensor((states * real).sum(1) / real.sum(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, 2)."""
        return torch.as_tensor(self.head(self.pooled(input_ids, attention_mask)))


def _minilm(name: str, data: Path, home: Path) -> Case:
    from transformers import AutoModel, AutoTokenizer

    folder = home / name
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    def part(file: str, count: int) -> TextSamples:
        lines = (data / "texts" / file).read_text(encoding="utf-8").splitlines()
        chosen = [lines[int(i)] for i in np.linspace(0, len(lines) - 1, min(count, len(lines)))]
        ids = [torch.tensor(tokenizer(line[2:], truncation=True, max_length=64)["input_ids"]) for line in chosen]
        return TextSamples(ids, torch.tensor([int(line[0]) for line in chosen]))

    whole, judged = part("sst2_train.txt", 1600), part("sst2_dev.txt", 400)
    model = SentimentModel(encoder, encoder.config.hidden_size).eval()
    _fit_head(model, whole)
    order = torch.randperm(1600, generator=torch.Generator().manual_seed(0)).tolist()
    train, held_out = ([whole.ids[i] for i in places] for places in (order[:1200], order[1200:]))
    labels = torch.as_tensor(whole.labels)
    samples = TextSamples(train, labels[order[:1200]])

    def metric(trained: nn.Module) -> float:
        batches = [judged.batch(range(i, min(i + 50, len(judged)))) for i in range(0, len(judged), 50)]
        with torch.no_grad():
            right = [main_output(call(trained, batch)).argmax(-1) == torch.as_tensor(batch.labels) for batch in batches]
        return float(torch.cat(right).double().mean())

    return Case(
        name=name, model=model, calibration=[dict(samples.batch(range(i, i + 8)).kwargs) for i in range(0, 96, 8)],
        train=samples, held_out=TextSamples(held_out, labels[order[1200:]]),
        metric=metric, metric_name="accuracy", higher_is_better=True,
        data="1600 sentences of sst2_train, on which the float head was fitted too, 1200 / 400; judged on 400 of sst2_dev",
        settings=replace(CLASSES, learning_rate=5e-5, steps=150, batch_size=16),
    )  # fmt: skip


def _fit_head(model: SentimentModel, samples: TextSamples) -> None:
    """Fit the linear layer in float, the encoder as it is: logistic regression by L-BFGS."""
    with torch.no_grad():
        batches = [samples.batch(range(i, i + 50)) for i in range(0, len(samples), 50)]
        features = torch.cat([model.pooled(**batch.kwargs) for batch in batches])
    labels = torch.as_tensor(samples.labels)
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        size = sum(p.square().sum() for p in model.head.parameters())
        loss = nn.functional.cross_entropy(model.head(features), labels) + 1e-4 * size
        loss.backward()
        return torch.as_tensor(loss)

    with torch.enable_grad():
        optimizer.step(closure)
    if not math.isfinite(float(model.head.weight.detach().sum())):
        raise RuntimeError("the float head did not converge")


_MAKERS: dict[str, Callable[[str, Path, Path], Case]] = {
    "kwt1": _split_classes,
    "resnet8_cifar10": _cifar,
    "resnet20_cifar10": _cifar,
    "mobilenet_vww": _split_classes,
    "charlstm_shakespeare": _shakespeare,
    "stories260k": _stories,
    "stories260k_outlier": _stories,
    "dtln": _dtln,
    "MiniLM": _minilm,
}
#: What is measured, in this order.
NAMES = tuple(_MAKERS)

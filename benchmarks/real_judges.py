"""Judges of the real models: output loss and task metric of a quantized model, sample by sample, on data that no run sees."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from alphasmith.objectives.judge.losses import divergences
from alphasmith.objectives.media.batch import main_output
from benchmarks.real_data import (
    Images,
    Pair,
    Wave,
    by_length,
    encoded,
    evenly,
    image_sets,
    judged_pairs,
    judged_waves,
    sentiment,
    windows,
)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A task metric: the mean of its values over the samples, or the exponential of it (perplexity)."""

    name: str
    higher_is_better: bool
    exponential: bool = False

    def value(self, values: Tensor) -> float:
        """The metric of (N,) values."""
        mean = float(values.double().mean())
        return math.exp(mean) if self.exponential else mean


@dataclass(frozen=True, eq=False)
class Judged:
    """A model as it was judged.

    Attributes:
        errors: (N,) float64 squared error of every sample's output against the float model's, or divergence of its logits [nats].
        energy: What their sum is divided by: squared norm of the float model's outputs, or the number of rows of logits.
        values: For each measure of the judge (M,) values of the samples.
    """

    errors: Tensor
    energy: float
    values: tuple[Tensor, ...]

    @property
    def loss(self) -> float:
        """Relative squared error of the outputs, or mean divergence of their rows."""
        return float(self.errors.sum()) / self.energy


class Judge(Protocol):
    """Judges models; the first one must be the float model, whose outputs the others are compared with."""

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The task metrics, in the order of ``Judged.values``."""
        ...

    def __call__(self, model: nn.Module) -> Judged:
        """Judge a model, in evaluation mode, without gradients."""
        ...


class References:
    """Outputs of the float model, in files: in memory they would count as memory of the run that is measured.

    Args:
        folder: Where they are kept; made.
        loss: What outputs are compared by: ``mse``, or ``kl`` of logits.
    """

    def __init__(self, folder: Path, loss: Literal["mse", "kl"] = "mse") -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._loss = loss
        self._energies: list[float] = []
        self.complete = False

    @property
    def energy(self) -> float:
        """What the sum of all errors is divided by: their squared norm, or the number of rows of logits."""
        return math.fsum(self._energies)

    def errors(self, index: int, output: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,) float64 squared errors, or divergences [nats], of the samples of a batch; of the float model, whose outputs are kept, zeros.

        Args:
            index: Number of the batch.
            output: (B, L, C) of the model.
            mask: (B, L) positions that count; None: all.
        """
        place = self._folder / f"{index}.pt"
        real = output if mask is None else output * mask[..., None]
        if not self.complete:
            torch.save(real.clone(), place)
            self._energies.append(
                float(real.double().square().sum()) if self._loss == "mse" else float(real[..., 0].numel())
            )
            return torch.zeros(len(real), dtype=torch.float64)
        reference: Tensor = torch.load(place, mmap=True)
        self.compare(real, reference, torch.ones(output.shape[:2]) if mask is None else mask)
        if self._loss == "kl":
            return divergences(real, reference).flatten(1).sum(1)
        return (real - reference).square().flatten(1).sum(1, dtype=torch.float64)

    def compare(self, output: Tensor, reference: Tensor, mask: Tensor) -> None:
        """Called with every output (B, L, C) that is compared, its reference, and the (B, L) positions that count."""


class LanguageJudge:
    """Output loss and perplexity on windows of one text, perplexity on those of others.

    Args:
        texts: (N, L) token ids of each text; the output loss is that of the first.
        names: Of the texts.
        references: Outputs of the float model.
    """

    _SIZE = 4

    def __init__(self, texts: Sequence[Tensor], names: Sequence[str], references: References) -> None:
        self._texts = texts
        self._references = references
        self.measures = tuple(Measure(name=f"perplexity, {n}", higher_is_better=False, exponential=True) for n in names)

    def __call__(self, model: nn.Module) -> Judged:
        """See :class:`Judge`."""
        errors, values = [], []
        for number, text in enumerate(self._texts):
            surprise = []
            for index, ids in enumerate(text.split(self._SIZE)):
                with torch.no_grad():
                    logits = main_output(model(input_ids=ids))
                told = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                surprise.append(told.reshape(len(ids), -1).mean(1))
                if number == 0:
                    errors.append(self._references.errors(index, logits))
            values.append(torch.cat(surprise))
        self._references.complete = True
        return Judged(torch.cat(errors), self._references.energy, tuple(values))


class EncoderJudge:
    """Output loss, retrieval of descriptions by titles, and a sentiment probe that was trained on the float model.

    Args:
        tokenizer: Of the model.
        pairs: Titles and descriptions retrieved.
        probed: Sentences whose sentiment is told; 0: no probe.
        references: Outputs of the float model.
    """

    _SIZE = 16
    _TRAINED = 600

    def __init__(self, tokenizer: Any, pairs: Sequence[Pair], probed: int, references: References) -> None:
        self._pairs = len(pairs)
        self._texts = [p.title for p in pairs] + [p.text for p in pairs]
        self._tokenizer = tokenizer
        self._probed = sentiment("dev", probed) if probed else ()
        self._probe: Any = None
        self._references = references
        names = ["recall@1", *(["SST-2 accuracy"] if probed else [])]
        entropy = Measure(name="retrieval cross entropy", higher_is_better=False)
        self.measures = (*(Measure(name=name, higher_is_better=True) for name in names), entropy)

    def __call__(self, model: nn.Module) -> Judged:
        """See :class:`Judge`."""
        errors: list[Tensor] = []

        def compared(index: int, output: Tensor, mask: Tensor) -> None:
            errors.append(self._references.errors(index, output, mask))

        embeddings = self._embedded(model, self._texts, compared)
        titles, texts = embeddings[: self._pairs], embeddings[self._pairs :]
        similarity = titles @ texts.T
        own = torch.arange(self._pairs)
        values = [(similarity.argmax(1) == own).double()]
        if self._probed:
            values.append(self._told(model))
        # The loss that such encoders are trained with, at their usual scale of 20: recall alone hardly tells two candidates apart.
        values.append(cross_entropy(similarity * 20, own, reduction="none"))
        self._references.complete = True
        return Judged(torch.cat(errors), self._references.energy, tuple(values))

    def _told(self, model: nn.Module) -> Tensor:
        from sklearn.linear_model import LogisticRegression

        if self._probe is None:
            train = sentiment("train", self._TRAINED)
            known = self._embedded(model, [s.text for s in train])
            self._probe = LogisticRegression(max_iter=1000).fit(known.numpy(), [s.label for s in train])
        guessed = self._probe.predict(self._embedded(model, [s.text for s in self._probed]).numpy())
        return torch.tensor([float(g == s.label) for g, s in zip(guessed, self._probed, strict=True)])

    def _embedded(
        self,
        model: nn.Module,
        texts: Sequence[str],
        seen: Callable[[int, Tensor, Tensor], None] = lambda index, output, mask: None,
    ) -> Tensor:
        """(N, C) mean over the tokens, of length 1, in the order of the texts."""
        found = []
        order = by_length(texts)  # little is filled up where lengths are alike
        for index, batch in enumerate(encoded(self._tokenizer, [texts[i] for i in order], self._SIZE)):
            with torch.no_grad():
                output = main_output(model(**batch))
            mask = batch["attention_mask"]
            seen(index, output, mask)
            found.append(normalize((output * mask[..., None]).sum(1), dim=1))
        ordered = torch.cat(found)
        return torch.empty_like(ordered).index_copy_(0, torch.tensor(order), ordered)


class ImageJudge:
    """Output loss, and the class of the nearest centroid of the float model's class tokens.

    Args:
        learned: Images that the centroids are the means of.
        judged: Others.
        references: Outputs of the float model.
    """

    _SIZE = 16

    def __init__(self, learned: Images, judged: Images, references: References) -> None:
        self._learned = learned
        self._judged = judged
        self._centroids: Tensor | None = None
        self._references = references
        self.measures = (
            Measure(name="nearest centroid accuracy", higher_is_better=True),
            Measure(name="cross entropy of the centroids", higher_is_better=False),
        )

    def __call__(self, model: nn.Module) -> Judged:
        """See :class:`Judge`."""
        if self._centroids is None:
            known = torch.cat([_states(model, part)[:, 0] for part in self._learned.pixels.split(self._SIZE)])
            means = [known[self._learned.labels == label].mean(0) for label in range(10)]
            self._centroids = normalize(torch.stack(means) - known.mean(0), dim=1)
            self._center = known.mean(0)
        errors, tokens = [], []
        for index, part in enumerate(self._judged.pixels.split(self._SIZE)):
            states = _states(model, part)
            errors.append(self._references.errors(index, states))
            tokens.append(states[:, 0])
        likeness = normalize(torch.cat(tokens) - self._center, dim=1) @ self._centroids.T
        right = (likeness.argmax(1) == self._judged.labels).double()
        # A temperature of a tenth spreads cosines over the range where a softmax tells them apart.
        entropy = cross_entropy(likeness * 10, self._judged.labels, reduction="none")
        self._references.complete = True
        return Judged(torch.cat(errors), self._references.energy, (right, entropy))


def _states(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return main_output(model(pixel_values=pixels))


class SpeechJudge:
    """Output loss on the float model's own transcripts, and words of greedy transcripts that differ from them.

    Args:
        processor: Feature extractor of the model.
        tokenizer: Of the model.
        waves: Clips.
        references: Outputs of the float model.
        written: Count words of transcripts, which take a pass for every token.
    """

    _LONGEST = 64

    def __init__(
        self,
        processor: Any,
        tokenizer: Any,
        waves: Sequence[Wave],
        references: References,
        *,
        written: bool = True,
    ) -> None:
        self._counted = written
        given = {"sampling_rate": 16_000, "return_tensors": "pt"}
        self._clips: list[Tensor] = [processor(wave, **given).input_features for wave in waves]
        self._tokenizer = tokenizer
        self._written: list[Tensor] = []
        self._references = references
        names = [*(["word error rate"] if written else []), "nats a token"]
        self.measures = tuple(Measure(name=name, higher_is_better=False) for name in names)

    def __call__(self, model: nn.Module) -> Judged:
        """See :class:`Judge`."""
        if not self._written:
            self._written = [self._transcript(model, clip) for clip in self._clips]
        errors, changed, surprise = [], [], []
        said = [self._words(tokens) for tokens in self._written]
        mean = sum(map(len, said)) / len(said)
        for index, (clip, tokens) in enumerate(zip(self._clips, self._written, strict=True)):
            with torch.no_grad():
                logits = main_output(model(input_features=clip, decoder_input_ids=tokens[:, :-1]))
            errors.append(self._references.errors(index, logits))
            surprise.append(cross_entropy(logits[0], tokens[0, 1:]))
            if self._counted:
                words = self._words(self._transcript(model, clip))
                changed.append(_changed(said[index], words) / mean)  # so that the mean is changed words by words
        self._references.complete = True
        values = (*([torch.tensor(changed)] if self._counted else []), torch.stack(surprise))
        return Judged(torch.cat(errors), self._references.energy, values)

    def _transcript(self, model: Any, clip: Tensor) -> Tensor:
        with torch.no_grad():
            made = model.generate(clip, max_new_tokens=self._LONGEST, do_sample=False, num_beams=1)
        start = torch.full((1, 1), int(model.config.decoder_start_token_id))
        # Whether the answer begins with what the decoder began with is up to the library.
        tokens: Tensor = made if int(made[0, 0]) == int(start) else torch.cat([start, made], dim=1)
        return tokens

    def _words(self, tokens: Tensor) -> list[str]:
        text: str = self._tokenizer.decode(tokens[0], skip_special_tokens=True)
        return text.split()


def _changed(said: list[str], heard: list[str]) -> int:
    """Words that were replaced, left out or put in."""
    parts = difflib.SequenceMatcher(a=said, b=heard, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in parts if kind != "equal")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is judged.

    Attributes:
        windows: Windows of each text.
        pairs: Titles and descriptions.
        probed: Sentences of the probe.
        images: Images judged.
        clips: Clips of speech.
        words: Whether words of transcripts are counted, which takes a pass for every token.
    """

    windows: int = 16
    pairs: int = 250
    probed: int = 300
    images: int = 160
    clips: int = 8
    words: bool = True


SHORT = Sizes(windows=8, pairs=120, probed=0, images=80, clips=6, words=False)


def make_judge(name: str, model_folder: Path, sizes: Sizes, work: Path) -> Judge:
    """The judge of a model.

    Args:
        name: Of the model, see ``real_folders.PACKAGES``.
        model_folder: Its folder.
        sizes: How much is judged.
        work: An existing folder; the references are kept in it.

    Raises:
        AbsentError: Data are not here.
    """
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    references = References(work / "references", "kl" if name in ("SmolLM2", "Whisper") else "mse")
    if name == "DINOv2":
        learned, judged = image_sets()
        return ImageJudge(
            Images(learned.pixels[-400:], learned.labels[-400:]),
            Images(judged.pixels[: sizes.images], judged.labels[: sizes.images]),
            references,
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    if name == "SmolLM2":
        names = ("wikitext2_test.txt", "tinystories_sample.txt")
        texts = [evenly(windows(tokenizer, file), sizes.windows) for file in names]
        return LanguageJudge(texts, ("wikitext-2", "TinyStories"), references)
    if name == "Whisper":
        return SpeechJudge(
            WhisperFeatureExtractor.from_pretrained(model_folder),
            tokenizer,
            judged_waves(sizes.clips),
            references,
            written=sizes.words,
        )
    return EncoderJudge(tokenizer, judged_pairs(sizes.pairs), sizes.probed, references)

"""Which loss at the output ranks candidate models as the task metric does? Kendall's tau over candidates, on real models.

    python -m benchmarks.output_losses [--home FOLDER] [--models MiniLM DINOv2 SmolLM2 Whisper] [--out docs/real_models.md]

Candidates under one scheme: one alpha for the model, random alphas for every kind of site, for every site, and for four groups of
channels by magnitude. Each is scored on little data (samples that calibrated) by the relative MSE of the outputs, the KL divergence of
their softmax over the last dimension, one minus their cosine row by row, and the task metric itself; the judge is the task metric
on more data that nothing else uses. "Excess" is how much of the way from the best to the median candidate the metric
lies at the candidate with the lowest loss: 0 picks the best one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing, tie_index
from alphasmith.search.model.search import ModelScales, SiteStatistics
from benchmarks.real_data import (
    WINDOW,
    Images,
    calibration_pairs,
    calibration_waves,
    drawn,
    evenly,
    image_sets,
    judged_pairs,
    judged_waves,
    windows,
)
from benchmarks.real_folders import AbsentError, home_folder, model_folder
from benchmarks.real_judges import EncoderJudge, ImageJudge, Judge, LanguageJudge, References, SpeechJudge
from benchmarks.real_runs import Request, candidates, configured
from benchmarks.timing import machine, median, parser, publish, table, torch_threads, with_threads

LOSSES = ("relative MSE", "KL divergence", "1 - cosine", "the metric itself")
_SINGLE = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
_OF_EACH = 8
_GROUPS = 4


class Comparison(References):
    """Outputs of the float model that count divergence and cosine as well."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._divergences: list[Tensor] = []
        self._cosines: list[Tensor] = []

    def compare(self, output: Tensor, reference: Tensor, mask: Tensor) -> None:
        """See :class:`References`."""
        real = mask.bool()
        log_q, log_p = (values[real].log_softmax(-1) for values in (output, reference))
        self._divergences.append(kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        self._cosines.append(1 - cosine_similarity(output[real], reference[real], dim=-1))

    def taken(self) -> tuple[float, float]:
        """Mean divergence [nats] and mean of one minus the cosine of what was compared since the last call."""
        means = (float(torch.cat(self._divergences).double().mean()), float(torch.cat(self._cosines).double().mean()))
        self._divergences, self._cosines = [], []
        return means


@dataclass(frozen=True, kw_only=True)
class Score:
    """A candidate: its losses on little data, in the order of ``LOSSES``, and its metric on more; lower is better."""

    kind: str
    losses: tuple[float, ...]
    metric: float


def proposals(
    sites: Mapping[str, SiteStatistics], kinds: Mapping[str, str], seed: int
) -> Iterator[tuple[str, Mapping[str, Smoothing]]]:
    """Candidates with the way they were made.

    Args:
        sites: Statistics of every site.
        kinds: Site -> name of its kind.
        seed: Draws the alphas.
    """
    generator = np.random.default_rng(seed)
    plain = ModelScales(sites)
    for alpha in _SINGLE:
        yield "one alpha", plain.single(alpha)
    names = list(dict.fromkeys(kinds.values()))
    by_kind = ModelScales(sites, _labels(sites, {n: names.index(kinds[n]) for n in sites}))
    by_site = ModelScales(sites, _labels(sites, {n: i for i, n in enumerate(sites)}))
    magnitudes = {n: _shared(s) for n, s in sites.items()}
    edges = torch.quantile(_sample(torch.cat(list(magnitudes.values()))), torch.tensor([0.5, 0.9, 0.99]))
    by_group = ModelScales(sites, {n: torch.bucketize(values, edges) for n, values in magnitudes.items()})
    for _ in range(_OF_EACH):
        yield "alpha per kind", by_kind(generator.uniform(0.5, 1.0, by_kind.k).tolist())
        center = generator.uniform(0.65, 0.9)
        yield "alpha per site", by_site(generator.normal(center, 0.1, by_site.k).clip(0.3, 1.0).tolist())
        yield "alpha per group", by_group(generator.uniform(0.5, 1.0, by_group.k).tolist())


def _labels(sites: Mapping[str, SiteStatistics], numbers: Mapping[str, int]) -> dict[str, Tensor]:
    return {n: torch.full((len(s.activation),), numbers[n], dtype=torch.int64) for n, s in sites.items()}


def _shared(site: SiteStatistics) -> Tensor:
    """Channel magnitudes, of tied channels the largest: these share a group."""
    ties = tie_index(site.ties, len(site.activation))
    largest = torch.zeros_like(site.activation).scatter_reduce(0, ties, site.activation, "amax")
    return largest[ties]


def _sample(values: Tensor) -> Tensor:
    return values[:: 1 + len(values) // 1_000_000]


def kind(site: Site) -> str:
    """What the operators of a site are: their module paths without numbers."""
    return ",".join(re.sub(r"\d+", "", operator.name) for operator in site.operators)


def judges(model: str, folder: Path, work: Path) -> tuple[Judge, Comparison, Judge]:
    """A judge on little data that calibrated, what it compares with, and one on more that did not."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    little, more = Comparison(work / "little"), References(work / "more")
    if model == "DINOv2":
        images, others = image_sets()
        known, seen = (Images(images.pixels[p], images.labels[p]) for p in (slice(600, 900), slice(0, 24)))
        return (
            ImageJudge(known, seen, little),
            little,
            ImageJudge(known, Images(others.pixels[:120], others.labels[:120]), more),
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if model == "Whisper":
        processor = WhisperFeatureExtractor.from_pretrained(folder)
        return (
            SpeechJudge(processor, tokenizer, calibration_waves(4, 0), little, written=False),
            little,
            SpeechJudge(processor, tokenizer, judged_waves(6), more, written=False),
        )
    if model == "SmolLM2":
        seen_windows = drawn(windows(tokenizer, "wikitext2_valid.txt"), 24, 0)[:4]
        unseen = evenly(windows(tokenizer, "wikitext2_test.txt"), 12)
        name = (f"{WINDOW} tokens",)
        return LanguageJudge([seen_windows], name, little), little, LanguageJudge([unseen], name, more)
    pairs = calibration_pairs(32, 0)
    return (
        EncoderJudge(tokenizer, pairs, 0, little),
        little,
        EncoderJudge(tokenizer, judged_pairs(160), 0, more),
    )


def scores(model: str, scheme: str, home: Path, work: Path) -> list[Score]:
    """Every candidate, scored both ways.

    Raises:
        AbsentError: Model or data are not here.
    """
    folder = model_folder(model, home)
    request = Request(model=model, scheme=scheme, seed=0, short=False, sweep=False, home=home)
    config, batches = configured(request, folder, work)
    candidate, sites, _ = candidates(config, batches)
    little, comparison, more = judges(model, folder, work)
    for judge in (little, more):
        judge(candidate.reset())
    kinds = {site.name: kind(site) for site in candidate.sites}
    made = []
    for name, smoothings in proposals(sites, kinds, 0):
        with candidate.applied(smoothings) as quantized:
            seen, unseen = little(quantized), more(quantized)
        divergence, cosine = comparison.taken()
        # The last measure is the finest: a mean of smooth values, where accuracies count.
        metric, small = (float(judged.values[-1].double().mean()) for judged in (unseen, seen))
        made.append(Score(kind=name, losses=(seen.loss, divergence, cosine, small), metric=metric))
        print(model, name, " ".join(f"{v:.5g}" for v in (*made[-1].losses, metric)), flush=True)
    return made


def row(model: str, metric: str, made: Sequence[Score]) -> tuple[str, ...]:
    """One line of the table."""
    metrics = np.array([s.metric for s in made])
    cells = []
    for number in range(len(LOSSES)):
        losses = np.array([s.losses[number] for s in made])
        tau = float(kendalltau(losses, metrics).statistic)
        good = metrics <= np.median(metrics)
        among = float(kendalltau(losses[good], metrics[good]).statistic)
        excess = (metrics[losses.argmin()] - metrics.min()) / (median(metrics.tolist()) - metrics.min())
        cells.append(f"{tau:.2f} / {among:.2f} / {excess:.2f}")
    return (model, metric, str(len(made)), *cells)


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("--home", type=Path, default=home_folder())
    arguments_of.add_argument("--models", nargs="*", default=["MiniLM", "DINOv2", "SmolLM2", "Whisper"])
    arguments_of.add_argument("--scheme", default="w8a8-channel-static")
    arguments = arguments_of.parse_args()
    rows = []
    metric = {
        "MiniLM": "retrieval cross entropy, 160 pairs",
        "DINOv2": "cross entropy of centroids, 120 images",
        "SmolLM2": "log perplexity, 12 x 128 tokens",
        "Whisper": "nats a token, 6 clips",
    }
    with torch_threads(arguments.threads):
        where = machine()
        for model in arguments.models:
            try:
                with tempfile.TemporaryDirectory() as work:
                    rows.append(row(model, metric[model], scores(model, arguments.scheme, arguments.home, Path(work))))
                print(" | ".join(rows[-1]), flush=True)
            except AbsentError as absent:
                print(f"left out: {absent}", flush=True)
    header = ("model", "metric", "candidates", *LOSSES)
    about = "Each cell: tau over all candidates / over the better half of them / excess of the one it picks."
    publish("OUTPUT_LOSSES", f"{where} Scheme {arguments.scheme}. {about}\n\n{table(header, rows)}", arguments.out)


if __name__ == "__main__":
    main()

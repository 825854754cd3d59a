"""The result of a search at one site: the winner, its losses, and how the search went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from pydantic import TypeAdapter
from torch import Tensor

from alphasmith.objectives.calibration.tensor_state import StateFormat
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import CandidateKind
from alphasmith.objectives.smoothing import SCALE_MAX, SCALE_MIN, Smoothing
from alphasmith.search.study.alpha_ranges import AlphaRange
from alphasmith.search.study.candidates import Candidate, TrialResult
from alphasmith.search.study.guard import Overruled
from alphasmith.search.study.space import SearchSpace
from alphasmith.storage.runs.entries import Losses, SearchFacts


@dataclass(frozen=True, kw_only=True)
class SiteResult:
    """What a search at one site found.

    Attributes:
        name: Site name.
        labels: (C,) int64 group of every channel, as the winner sees them.
        ranges: (K,) alpha range of every group.
        magnitudes: (K,) representative magnitude of every group.
        outliers: (K,) whether the grouping calls the group an outlier group.
        requested_k: Groups asked for; larger than K when the channels do not support that many.
        candidate: The winner; a baseline when nothing beat it on held-out rows.
        smoothing: What the winner does to the site.
        refitted: Whether scales, shift and range were taken again from all rows, search and held-out ones, once the winner was chosen. Its
            losses are always those of before: no row has judged what was fitted to it.
        grouping: Grouping method of the winner.
        statistic: Channel statistic of the winner.
        plain: What the three baselines do to the site: ``identity``, ``alpha_0.5``, ``best_single``.
        slopes: (C,) float64, d log s / d alpha of every channel as the winner sees it: ``log a + log w`` (fA1), or ``log a``
            where it has betas.
        search: Losses on the search rows.
        held_out: Losses on the held-out rows.
        overruled: Set when the best search trial lost to another on held-out rows.
        results: All trials.
        exact_evaluations: Candidates scored on search or held-out rows.
        seconds: Wall time [s].
        space: What its study searched.
        study_name: Name of the Optuna study.
        facts: Why the search ended and how the noise model did.
        trace: (seconds since the start, loss on all search rows) at every new incumbent.
    """

    name: str
    labels: torch.Tensor
    ranges: tuple[AlphaRange, ...]
    magnitudes: tuple[float, ...]
    outliers: tuple[bool, ...]
    requested_k: int
    candidate: Candidate
    smoothing: Smoothing
    grouping: str
    statistic: str
    plain: Mapping[str, Smoothing]
    refitted: bool
    slopes: torch.Tensor
    search: Losses
    held_out: Losses
    overruled: Overruled | None
    results: tuple[TrialResult, ...]
    exact_evaluations: int
    seconds: float
    study_name: str
    facts: SearchFacts
    trace: tuple[tuple[float, float], ...]
    space: SearchSpace

    def cpu(self) -> SiteResult:
        """The same with every tensor on the CPU, so that it can travel."""
        return replace(
            self,
            labels=self.labels.cpu(),
            smoothing=self.smoothing.to("cpu"),
            plain={kind: smoothing.to("cpu") for kind, smoothing in self.plain.items()},
            slopes=self.slopes.cpu(),
        )

    @property
    def winner(self) -> CandidateKind:
        """Where the winner comes from."""
        return self.candidate.kind

    @property
    def best_single_alpha(self) -> float:
        """The best single alpha."""
        return self.search.best_single_alpha

    @property
    def alphas(self) -> tuple[float, ...] | None:
        """(K,) alphas of the winner, None when identity won."""
        return None if self.candidate.alphas is None else self.candidate.alphas[: len(self.ranges)]

    @property
    def scales(self) -> torch.Tensor:
        """(C,) smoothing scales of the winner."""
        return self.smoothing.scales

    @property
    def best_single(self) -> Smoothing:
        """What the best single alpha does to the site."""
        return self.plain["best_single"]

    def moved(self, delta: float) -> tuple[Candidate, Smoothing]:
        """The winner with every alpha moved by ``delta``, within [0, 1]; identity, which has no alpha, stays as it is."""
        if self.alphas is None or delta == 0.0:
            return self.candidate, self.smoothing
        alphas = tuple(min(1.0, max(0.0, a + delta)) for a in self.alphas)
        steps = torch.tensor([new - old for new, old in zip(alphas, self.alphas, strict=True)], dtype=torch.float64)
        exponent = steps.to(self.slopes.device)[self.labels.to(self.slopes.device)] * self.slopes
        scales = (self.smoothing.scales * exponent.exp()).clamp(SCALE_MIN, SCALE_MAX).to(torch.float32)
        return replace(self.candidate, kind="refined", alphas=alphas), replace(self.smoothing, scales=scales)

    @property
    def range_statistic(self) -> str:
        """How the winner's static activation range is set."""
        return self.candidate.range

    @property
    def loss(self) -> float:
        """Winner's loss on the search rows."""
        return self.search.ours

    @property
    def held_out_loss(self) -> float:
        """Winner's loss on the held-out rows."""
        return self.held_out.ours

    @property
    def limit(self) -> float | None:
        """Held-out loss of scales chosen freely per channel on the search rows; None when it was not computed."""
        return self.held_out.limit

    @property
    def baselines(self) -> dict[str, float | None]:
        """Held-out losses of identity, alpha_0.5 and best_single."""
        return {
            "identity": self.held_out.identity,
            "alpha_0.5": self.held_out.alpha_half,
            "best_single": self.held_out.best_single,
        }

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial: number, candidate, state, loss, seconds, reason and the trial's parameters."""
        rows = [
            {
                "number": r.number,
                "candidate": r.candidate.kind,
                "state": r.state,
                "loss": r.loss,
                "seconds": r.seconds,
                "reason": r.reason,
                **dict.fromkeys(self.space.names),
                **r.candidate.params(),
            }
            for r in self.results
        ]
        return pd.DataFrame(rows)


_FORMAT = StateFormat(SiteResult, version=3, what="site result", remedy="search the site again")


def result_state(result: SiteResult) -> dict[str, Tensor]:
    """The whole result as contiguous CPU tensors that share no memory, e.g. for safetensors."""
    return _FORMAT.state(result)


def result_from_state(state: Mapping[str, Tensor]) -> SiteResult:
    """The result whose ``state`` this is, equal to the bit; its tensors are where those of ``state`` are.

    Raises:
        InputError: Something is missing, or another version of Alphasmith wrote it.
    """
    return _FORMAT.record(state)


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON: ``{"kind": ..., "params": {...}}``, with the parameters that Optuna's trials have."""
    return {"kind": candidate.kind, "params": candidate.params()}


def candidate_of(value: Mapping[str, Any]) -> Candidate:
    """The candidate that :func:`candidate_json` made ``value`` from.

    Raises:
        InputError: It is no candidate, or one that another version of Alphasmith wrote.
    """
    try:
        found = asdict(Candidate.of(value["kind"], value["params"]))
        return TypeAdapter(Candidate).validate_python(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("candidate", "a recorded candidate cannot be read", "search without search.reuse") from error

"""The interface of an engine, and the messages between the process that records a run and those that evaluate.

A site's rows and weights travel to the worker that searches it, never the model; a model travels once to every worker that
scores candidate models. What a search finds travels back as it is found, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import nn

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.judge.model_objective import ModelLoss, ModelObjective
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import ChannelRange
from alphasmith.search.site.result import SiteResult
from alphasmith.search.site.settings import SiteSettings
from alphasmith.search.study.fault_isolation import Racer
from alphasmith.search.study.study_record import StudyMessage, StudyPast

#: Called in the process that submitted the work: (site, message).
OnMessage: TypeAlias = Callable[[str, StudyMessage], None]


class Work(Protocol):
    """A piece of work for one worker: the search of a site, or whatever the engine was told to perform. It can be pickled."""

    @property
    def site(self) -> str:
        """Name of it; of the site, where it is the search of one."""
        ...

    @property
    def memory(self) -> int:
        """Predicted memory at its peak [bytes]; 0: unknown."""
        ...

    @property
    def past(self) -> StudyPast:
        """What was told of it before; the field of a dataclass."""
        ...


@dataclass(frozen=True, kw_only=True)
class SiteWork:
    """Everything that is needed to search one site. Tensors are on the CPU; pickles without the model.

    Attributes:
        site: Site name.
        study_name: Name of its study.
        data: Rows to search on, weights and statistics.
        held_out: Rows that judge the winner.
        settings: What to try.
        memory: Predicted memory of the search at its peak [bytes]; what a share of a GPU is computed from.
        past: What is recorded of the study already; its trials are not repeated.
    """

    site: str
    study_name: str
    data: SiteData
    held_out: SiteData
    settings: SiteSettings
    memory: int = 0
    past: StudyPast = field(default_factory=StudyPast)


@dataclass(frozen=True, kw_only=True)
class SearchEnd:
    """How one piece of work ended. At most one of ``result``, ``reason`` and ``stopped`` tells; none where it keeps its results itself.

    Attributes:
        site: Site name.
        result: What was found; None where the search did not end well.
        reason: Why it did not, one line.
        lost: Whether the worker died or vanished, so that another attempt makes sense; else the search itself failed.
        stopped: Whether it ended because the engine was stopped.
    """

    site: str
    result: SiteResult | None = None
    reason: str = ""
    lost: bool = False
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """Everything that is needed to score candidate models at the output; shipped once to every worker.

    Attributes:
        model: The float model, on the CPU.
        sites: Its sites.
        ranges: Site name -> calibrated range of every channel.
        scheme: Quantization scheme, of all sites or site by site.
        skip: Operators left in float, see ``CandidateModel``.
        batches: The data to be processed, on the CPU.
        loss: Loss at the output.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    ranges: Mapping[str, ChannelRange]
    scheme: Scheme | SiteSchemes
    skip: tuple[str, ...]
    batches: tuple[Batch, ...]
    loss: ModelLoss

    def judge(self, device: str) -> ModelObjective:
        """A new judge on ``device``; the model is moved there and changed in place while candidates are scored."""
        candidate = CandidateModel(self.model.to(device), self.sites, self.ranges, self.scheme, self.skip)
        return ModelObjective(candidate, [batch.to(device) for batch in self.batches], loss=self.loss)


class Engine(Protocol):
    """Evaluates on behalf of the one process that records. Not for use from several threads, except ``stop``."""

    @property
    def name(self) -> str:
        """Display name, e.g. ``local, 2 processes``."""
        ...

    @property
    def slots(self) -> int:
        """Pieces of work it can take at present beyond those it holds; may change, e.g. as nodes join a cluster."""
        ...

    def submit(self, work: Work) -> None:
        """Take one piece of work; at most ``slots`` may be given."""
        ...

    def wait(self, receive: OnMessage, timeout: float) -> list[SearchEnd]:
        """Pass on what searches tell, until one or more have ended or ``timeout`` seconds are over.

        Messages of one site arrive in order, and all of them before its ``SearchEnd``. A message that a search has sent is
        passed on even if its worker died afterwards. Returns at once where no work is held.
        """
        ...

    def racer(self, judge: ModelObjective, work: Callable[[], ModelWork]) -> Racer:
        """What scores candidate models: the workers together, or ``judge`` itself where there are none.

        Args:
            judge: Judge in this process.
            work: Makes what is shipped to the workers; called only where there are some.
        """
        ...

    def stop(self) -> None:
        """Let every search end after the batch it is at; they end as ``stopped``. May be called from any thread."""
        ...

    def close(self) -> None:
        """End the workers at once; work still held is forgotten."""
        ...

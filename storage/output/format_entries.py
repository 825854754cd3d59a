"""The parts of a manifest about formats of sites: the front of the choices, what was picked of it, or advice. Units stand at the fields."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from alphasmith.objectives.literals import SiteFormat, Target
from alphasmith.storage.runs.entries import Name, Part, Prose, Volatile

Share = Annotated[float, Field(ge=0, le=1 + 1e-9)]


class FormatPoint(Part):
    """One choice of formats for all sites, measured at the model's output."""

    number: NonNegativeInt
    """Of its trial in the study, by which it is picked."""
    formats: dict[Name, SiteFormat] = Field(default_factory=dict)
    """Site -> its format; the others have the scheme's own."""
    cost: NonNegativeFloat
    """In the unit of ``cost_unit``."""
    share_of_macs: Share
    """Part of the multiply-adds of quantized sites that is done in formats dearer than the scheme's own."""
    predicted: NonNegativeFloat | None
    """Output loss by formula fA18; null where nothing could be predicted."""
    loss: NonNegativeFloat | None
    """Output loss as measured on the tuning samples; null where it is not finite."""
    on_front: bool = False
    """Whether no other point is as good in cost and loss and better in one of them."""
    reason: Prose = ""
    """Why it has no loss."""


class FormatsEntry(Part):
    """What sites may be quantized to beside the scheme's own format, and what was chosen under the budget."""

    own: SiteFormat
    """Format of the scheme."""
    choices: tuple[SiteFormat, ...]
    target: Target
    sites: NonNegativeInt
    """Sites with a choice."""
    loss: Literal["mse", "kl"]
    """Of ``points``: relative squared error, or divergence [nats]."""
    cost_unit: Literal["share of multiply-adds", "time relative to the scheme's own format"]
    limit: NonNegativeFloat | None
    """Most that was allowed, in that unit; null: no budget, so that the cheapest choices alone count."""
    points: tuple[FormatPoint, ...]
    """Every choice that was measured, by number."""
    picked: NonNegativeInt
    """The point that ``quantized/`` holds."""
    reason: Prose
    """Why it was picked."""
    before: NonNegativeFloat | None = None
    """Held-out output loss with the scheme's own format at every site; null where it is not finite."""
    after: NonNegativeFloat | None = None
    """That of the best choice within the budget."""
    difference: float | None = None
    """``before`` minus ``after``, paired over the held-out samples."""
    standard_error: NonNegativeFloat | None = None
    metric: float | None = None
    """Task metric with what the run picked; null where there is none."""
    passes: NonNegativeFloat
    """Samples that were run through the model or its operators, over the number of calibration samples."""
    seconds: Annotated[NonNegativeFloat, Volatile] = 0.0
    """Time spent [s]."""
    study: Annotated[str | None, Volatile] = None
    """Optuna study."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        numbers = Counter(point.number for point in self.points)
        if any(count > 1 for count in numbers.values()):
            raise ValueError("two points have one number")
        if self.picked not in numbers:
            raise ValueError(f"no point has the number {self.picked}, which was picked")
        return self

    @property
    def chosen(self) -> FormatPoint:
        """The point that was picked."""
        return next(point for point in self.points if point.number == self.picked)

    @property
    def front(self) -> tuple[FormatPoint, ...]:
        """The points of the front, from the cheapest to the dearest."""
        return tuple(sorted((p for p in self.points if p.on_front), key=lambda p: (p.cost, p.number)))

    @property
    def pickable(self) -> tuple[FormatPoint, ...]:
        """The points that can be written: of the front, the one that was picked, the scheme's own format at every site; by number."""
        return tuple(p for p in self.points if p.on_front or p.number == self.picked or not p.formats)


class FormatAdvice(Part):
    """What another format at the few sites that make most of the error would bring, where no choice of formats was asked for."""

    sites: tuple[Name, ...]
    """The fewest sites that make half of the predicted output error."""
    of: PositiveInt
    """Sites whose share is known."""
    share: Share
    """Part of the predicted output error that these sites make."""
    format: SiteFormat
    """What they were given."""
    before: NonNegativeFloat
    """Held-out output loss of what is kept."""
    after: NonNegativeFloat
    """With that format at these sites."""
    share_of_macs: Share
    """Part of the multiply-adds of quantized sites that these sites do."""

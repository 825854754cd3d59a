"""What the formats of sites may cost: a share of the multiply-adds, or a time by a table of the hardware."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Annotated, get_args

from pydantic import BeforeValidator, Field

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import SiteFormat, Target
from alphasmith.objectives.quantization.formats import check_served, format_of, is_dearer, served
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.reading import read_text, usable_path, value_problem
from alphasmith.objectives.text import listed, number
from alphasmith.search.sections import Section

#: Largest file of a table [bytes].
_MOST_TABLE = 2**16
_REMEDY = "give a table of formats with their time or relative cost, or a TOML file that is one"

Cost = Annotated[float, Field(gt=0, lt=1e12)]


def read_latency(value: object) -> object:
    """A TOML file of formats and their costs -> its table; anything else passes through to pydantic.

    Raises:
        InputError: The file cannot be read or is no TOML.
    """
    if not isinstance(value, str):
        return value
    path = usable_path("latency", value)
    text = read_text(path, field="latency", remedy=_REMEDY, most=_MOST_TABLE)
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError("latency", f"{path} is not valid TOML ({error})", _REMEDY) from error
    if problem := value_problem(table):
        raise InputError("latency", f"{path} {problem}", _REMEDY)
    return table


class BudgetConfig(Section):
    """What formats of sites may cost beyond the scheme's own. At most one of ``share_of_macs`` and ``latency_factor``.

    Attributes:
        share_of_macs: Largest share of the multiply-adds of quantized sites that may be done in formats dearer than the scheme's
            own (per token, 16-bit, float). None: no such budget.
        latency: Format -> what a multiply-add in it takes on the target, in seconds or relative to any other; or a TOML file that holds
            that table. Empty: with ``latency_factor``, times follow from the sizes of sites and ``hardware`` (formula fA19).
        latency_factor: Longest time of all sites over that in the scheme's own format. None: no such budget.
    """

    share_of_macs: float | None = Field(default=None, ge=0, le=1)
    latency: Annotated[dict[SiteFormat, Cost], BeforeValidator(read_latency)] = Field(default={})
    latency_factor: float | None = Field(default=None, gt=0, lt=1e6)

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self.share_of_macs is not None or self.latency_factor is not None

    @property
    def timed(self) -> bool:
        """Whether costs are times, not a share of multiply-adds."""
        return bool(self.latency) or self.latency_factor is not None

    @property
    def by_hardware(self) -> bool:
        """Whether times follow from the hardware, site by site."""
        return self.timed and not self.latency

    @property
    def limit(self) -> float | None:
        """Most that a choice of formats may cost: a share of multiply-adds, or times the time in the scheme's own; None: no limit."""
        return self.latency_factor if self.timed else self.share_of_macs

    def cost(self, name: SiteFormat, own: SiteFormat) -> float:
        """Cost of all multiply-adds in one format: time relative to the scheme's own, or 1 where it is dearer than that and 0 else.

        Not asked for where times follow from the hardware.

        Args:
            name: The format.
            own: That of the scheme.
        """
        return self.latency[name] / self.latency[own] if self.latency else float(is_dearer(name, own))

    def choices(self, scheme: Scheme, formats: Sequence[SiteFormat], target: Target) -> tuple[SiteFormat, ...]:
        """What a site can be quantized to under a checked configuration, from the cheapest to the dearest; empty: no choice is to be made.

        Args:
            scheme: The model's own.
            formats: ``sites.formats``.
            target: What will serve the model.
        """
        if formats:
            return tuple(name for name in get_args(SiteFormat) if name in formats)
        if not self.given:
            return ()
        possible = served(target, scheme)
        return tuple(name for name in possible if not self.latency or name in self.latency)

    def check(self, scheme: Scheme, formats: Sequence[SiteFormat], target: Target) -> None:
        """Require that formats, target, table and limit go together.

        Args:
            scheme: The model's own.
            formats: ``sites.formats``.
            target: What will serve the model.

        Raises:
            InputError: They do not: names the field, and for a limit that nothing meets the nearest one that is met.
        """
        own = format_of(scheme)
        if target != "any" and own is not None:
            check_served("target", [own], target, scheme)
        check_served("sites.formats", formats, target, scheme)
        if not formats and not self.given:
            if self.latency:
                raise InputError(
                    "budget.latency", "is given without a limit", "add budget.latency_factor or sites.formats"
                )
            return
        if own is None:
            field = "sites.formats" if formats else "budget"
            raise InputError(
                field, "is given, but the scheme quantizes no activations", "choose another scheme or leave it out"
            )
        if self.share_of_macs is not None and (self.latency or self.latency_factor is not None):
            raise InputError("budget", "has a share of multiply-adds and a latency", "keep one of them")
        self._check_table(own, formats)
        self._check_limit(own, self.choices(scheme, formats, target))

    def _check_table(self, own: SiteFormat, formats: Sequence[SiteFormat]) -> None:
        missing = [name for name in (own, *formats) if self.latency and name not in self.latency]
        if missing:
            raise InputError(
                "budget.latency", f"says nothing of {missing[0]!r}", f"add it beside {listed([*self.latency], 7)}"
            )

    def _check_limit(self, own: SiteFormat, choices: Sequence[SiteFormat]) -> None:
        """A limit below the cheapest choice is met by no model; of the hardware's times nothing is known before the sites are."""
        if self.by_hardware:
            return
        cheapest = min(choices, key=lambda name: self.cost(name, own))
        least, limit = self.cost(cheapest, own), self.limit
        if limit is None or least <= limit:
            return
        field = "budget.latency_factor" if self.latency else "budget.share_of_macs"
        problem = (
            f"{number(limit)} is met by no choice of formats; the nearest is {number(least)}, {cheapest} at every site"
        )
        remedy = f"give at least {number(least)}" + ("" if own in choices else f", or add {own!r} to sites.formats")
        raise InputError(field, problem, remedy)

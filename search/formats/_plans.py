"""A format for every site, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from alphasmith.objectives.literals import SiteFormat
from alphasmith.objectives.quantization.formats import is_dearer, scheme_of
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.search.formats._program import Plan


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What there is to choose from.

    Attributes:
        schemes: The model's own; sites that it names have no choice.
        own: Format of all others.
        formats: Formats of a site, from the cheapest to the dearest.
        sites: Sites with a choice, in forward order.
        shares: Site -> its part of the multiply-adds of all of them, 0 to 1.
    """

    schemes: SiteSchemes
    own: SiteFormat
    formats: tuple[SiteFormat, ...]
    sites: tuple[str, ...]
    shares: Mapping[str, float]

    def uniform(self, name: SiteFormat) -> Plan:
        """One format at every site.

        Args:
            name: One of :attr:`formats`.
        """
        return (self.formats.index(name),) * len(self.sites)

    def changed(self, plan: Plan) -> dict[str, SiteFormat]:
        """Site -> format, where that is not the scheme's own.

        Args:
            plan: A format for every site.
        """
        given = {site: self.formats[place] for site, place in zip(self.sites, plan, strict=True)}
        return {site: name for site, name in given.items() if name != self.own}

    def under(self, plan: Plan) -> SiteSchemes:
        """The schemes of the model's sites under a plan.

        Args:
            plan: A format for every site.
        """
        return schemes_of(self.schemes, self.changed(plan))

    def share_of_macs(self, plan: Plan) -> float:
        """Part of the multiply-adds in formats dearer than the scheme's own.

        Args:
            plan: A format for every site.
        """
        changed = self.changed(plan)
        return sum(self.shares[site] for site, name in changed.items() if is_dearer(name, self.own))


def schemes_of(schemes: SiteSchemes, changed: Mapping[str, SiteFormat]) -> SiteSchemes:
    """The schemes of a model's sites of which some have another format.

    Args:
        schemes: The model's own.
        changed: Site -> its format.
    """
    return schemes.changed({site: scheme_of(name, schemes.default) for site, name in changed.items()})


def plan_key(changed: Mapping[str, SiteFormat]) -> str:
    """The same text for the same formats.

    Args:
        changed: Site -> format.
    """
    return json.dumps(dict(sorted(changed.items())), ensure_ascii=False)

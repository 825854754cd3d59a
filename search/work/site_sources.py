"""Sources of a site's rows and weights: the model in this process, or what its driver has published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from alphasmith.objectives.calibration.producers import Producers
from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.inputs.preparation import PreparedModel
from alphasmith.search.work._published_site import PublishedSite, dependencies, publish
from alphasmith.storage.artifacts.run_artifacts import RunArtifacts

#: Metadata of a published site's weights: its place in forward order.
_POSITION = "position"


class SiteSource(Protocol):
    """Sites of one run and what a search of each needs.

    Attributes:
        order: Names of the sites to search, those that write into other sites' weights first.
    """

    order: Sequence[str]

    def site(self, name: str) -> Site:
        """One of the sites."""
        ...

    def position(self, name: str) -> int:
        """Its place in forward order among all sites of the model, from 0."""
        ...

    def rows(self, name: str, smoothings: Mapping[str, Smoothing]) -> tuple[SiteData, SiteData]:
        """Search and held-out rows, with the weights as the winners of the sites that fold into them leave them.

        Args:
            name: A site of ``order``.
            smoothings: Winner of every site that its ticket depends on, at least.
        """
        ...


class PreparedSites:
    """Sites of a model that is in this process.

    Attributes:
        order: See :class:`SiteSource`.
        tensors: Pristine parameters and buffers of the model by full name.
        producers: Quantized weights that the sites' scales divide.
        first: Sites of the whole model before these.

    Args:
        prepared: Sites and calibration.
        first: Where these are sites of a part of the model: how many sites come before it.
    """

    def __init__(self, prepared: PreparedModel, *, first: int = 0) -> None:
        self._prepared = prepared
        self._sites = {s.name: s for s in prepared.sites}
        self._positions = {s.name: first + i for i, s in enumerate(prepared.sites)}
        self.first = first
        self.order: Sequence[str] = prepared.order
        self._depends_on = dependencies([self._sites[name] for name in prepared.order])
        model = prepared.survey.model
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.tensors = {name: value.detach() for name, value in tensors.items()}
        self.producers = Producers(prepared.sites, self.tensors, prepared.calibration, prepared.skip)

    def site(self, name: str) -> Site:
        """See :class:`SiteSource`."""
        return self._sites[name]

    def position(self, name: str) -> int:
        """See :class:`SiteSource`."""
        return self._positions[name]

    def depends_on(self, name: str) -> tuple[str, ...]:
        """Sites whose winners change the weights of this one, in search order."""
        return self._depends_on[name]

    def rows(self, name: str, smoothings: Mapping[str, Smoothing]) -> tuple[SiteData, SiteData]:
        """See :class:`SiteSource`."""
        whole = PublishedSite(
            site=self._sites[name],
            calibration=self._prepared.calibration,
            held_out=self._prepared.held_out,
            weights=self.tensors,
            depends_on=tuple(self._sites[other] for other in self._depends_on[name]),
            producers=self.producers.rows(self._sites[name]),
        )
        return whole.data(smoothings)


class PublishedSites:
    """Sites of a run whose model is elsewhere: what its driver has put into the artifact store.

    Args:
        kept: Objects of the run.
        order: Names of its sites.
    """

    def __init__(self, kept: RunArtifacts, order: Sequence[str]) -> None:
        self._kept = kept
        self.order = order
        self._last: PublishedSite | None = None
        self._positions: dict[str, int] = {}

    def site(self, name: str) -> Site:
        """See :class:`SiteSource`."""
        return self._published(name).site

    def position(self, name: str) -> int:
        """See :class:`SiteSource`."""
        if name not in self._positions:
            self._published(name)
        return self._positions[name]

    def rows(self, name: str, smoothings: Mapping[str, Smoothing]) -> tuple[SiteData, SiteData]:
        """See :class:`SiteSource`.

        Raises:
            InputError: The driver has not published the site, or its objects are gone.
        """
        return self._published(name).data(smoothings)

    def _published(self, name: str) -> PublishedSite:
        if self._last is None or self._last.site.name != name:  # asked for twice in a row: rows, then the record
            weights, rows = self._kept.look("weights", name), self._kept.look("calibration", name)
            if weights.tensors is None or rows.tensors is None:
                why = weights.reason or rows.reason
                raise InputError("artifacts", f"site {name} is not published ({why})", "resume the run with its driver")
            self._positions[name] = int(weights.metadata[_POSITION])
            self._last = PublishedSite.restored(weights.tensors, rows.tensors)
        return self._last


def publish_sites(prepared: PreparedModel, source: PreparedSites, kept: RunArtifacts) -> None:
    """Put every site's weights into the artifact store for :class:`PublishedSites`; its rows are there as calibration."""
    sites = [source.site(name) for name in source.order]
    for published in publish(sites, source.tensors, prepared.calibration, prepared.held_out, source.producers):
        name = published.site.name
        place = {_POSITION: str(source.position(name))}
        kept.put("weights", name, published.weights_state(), metadata=place)

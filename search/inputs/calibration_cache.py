"""Calibration rows and statistics in the artifact store, found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alphasmith.objectives.calibration.calibrate import Calibration
from alphasmith.objectives.calibration.tensor_state import independent, prefixed, unprefixed
from alphasmith.objectives.sites.types import Site
from alphasmith.search.config import RunConfig
from alphasmith.search.inputs.task import Task
from alphasmith.storage.artifacts.run_artifacts import ArtifactContent, RunArtifacts

#: Metadata of an object: what it was made from, by which a run knows its own.
_KEY = "key"
_SEARCH, _HELD_OUT = "search.", "held_out."


class CalibrationCache:
    """One object per site, with the rows to search on and the held-out ones.

    A run is on record only once its calibration is made, so that an error in model or data leaves nothing behind: what is to
    be saved before then waits for :meth:`attach`.

    Args:
        config: The run's configuration.
        task: Its model and data.
        kept: Objects of the run; those of other runs are looked through, too. None: the run is not on record yet.
        others: Objects of other runs, to be looked through until it is; None: there are none.
    """

    def __init__(
        self, config: RunConfig, task: Task, kept: RunArtifacts | None = None, *, others: RunArtifacts | None = None
    ) -> None:
        self._config = config
        self._task = task
        self._kept = kept
        self._others = others
        self._waiting: tuple[Sequence[Site], int, Calibration, Calibration] | None = None

    def attach(self, kept: RunArtifacts) -> None:
        """The run is on record: keep with it what waits."""
        self._kept, self._others = kept, None
        if self._waiting is not None:
            self.save(*self._waiting)
            self._waiting = None

    def key(self, sites: Sequence[Site], rows: int) -> str:
        """Digest of everything that decides the rows and statistics.

        Args:
            sites: Sites that are calibrated.
            rows: Rows kept per site.
        """
        search, data = self._config.search, self._config.data
        made_from = {
            "model": self._task.loaded.digest,
            "data": self._task.data_digest,
            # The same batches may be split in other places.
            "splits": (data.samples, data.held_out, data.proof),
            "sites": [(s.name, s.channels, [o.name for o in s.operators]) for s in sites],
            "rows": rows,
            "seed": search.seed,
            "statistic": search.statistic,
            "percentile": search.percentile,
            "torch": torch.__version__,
        }
        if search.objective == "output":
            made_from["weights"] = search.objective
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def load(self, sites: Sequence[Site], rows: int) -> tuple[Calibration, Calibration] | None:
        """Both calibrations, or None where an object is missing, damaged or of something else.

        Those of another run are kept with this one, too: its workers look for no others, and the other run may end first.
        """
        kept = self._kept or self._others
        if kept is None or not sites:
            return None
        key = self.key(sites, rows)
        states = _own(kept, sites, key)
        if states is not None:
            return _merged(states)
        states = _of_any_run(kept, sites, key)
        if states is None:
            return None
        search, held_out = _merged(states)
        self.save(sites, rows, search, held_out)
        return search, held_out

    def save(self, sites: Sequence[Site], rows: int, calibration: Calibration, held_out: Calibration) -> None:
        """Keep both calibrations with this run, now or as soon as it is on record."""
        if self._kept is None:
            self._waiting = (sites, rows, calibration, held_out)
            return
        key = self.key(sites, rows)
        told = {_KEY: key}
        states = (
            ArtifactContent(
                name=site.name, tensors=calibration_state(calibration, held_out, site.name), key=key, metadata=told
            )
            for site in sites
        )
        self._kept.put_many("calibration", states)


def calibration_state(calibration: Calibration, held_out: Calibration, site: str) -> dict[str, Tensor]:
    """What both calibrations know of one site as tensors that share no memory; see :func:`calibrations_of`.

    Raises:
        InputError: The site was not calibrated.
    """
    search, reserve = calibration.only(site).state(), held_out.only(site).state()
    return independent(prefixed(_SEARCH, search) | prefixed(_HELD_OUT, reserve))


def calibrations_of(state: Mapping[str, Tensor]) -> tuple[Calibration, Calibration]:
    """The calibration to search on and the held-out one, each of one site; ``Calibration.merged`` joins those of many.

    Raises:
        InputError: A tensor is missing, or another version of Alphasmith wrote it.
    """
    return Calibration.from_state(unprefixed(_SEARCH, state)), Calibration.from_state(unprefixed(_HELD_OUT, state))


def _own(kept: RunArtifacts, sites: Sequence[Site], key: str) -> list[Mapping[str, Tensor]] | None:
    """What this run kept of every site under this key; None where that is not all there."""
    states: list[Mapping[str, Tensor]] = []
    for site in sites:
        found = kept.look("calibration", site.name)
        if found.tensors is None or found.metadata.get(_KEY) != key:
            return None
        states.append(found.tensors)
    return states


def _of_any_run(kept: RunArtifacts, sites: Sequence[Site], key: str) -> list[Mapping[str, Tensor]] | None:
    found = {artifact.name: artifact for artifact in reversed(kept.find("calibration", key))}
    states: list[Mapping[str, Tensor]] = []
    for site in sites:
        state = kept.load(found[site.name]) if site.name in found else None
        if state is None:
            return None
        states.append(state)
    return states


def _merged(states: Sequence[Mapping[str, Tensor]]) -> tuple[Calibration, Calibration]:
    search, held_out = zip(*map(calibrations_of, states), strict=True)
    return Calibration.merged(search), Calibration.merged(held_out)

"""Calibration rows and statistics in the artifact store, found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from alphasmith.objectives.calibration import Calibration
from alphasmith.objectives.sites.types import Site
from alphasmith.search.config import RunConfig
from alphasmith.search.published import calibration_state, calibrations_of
from alphasmith.search.task import Task
from alphasmith.storage.kept import Keepsake, KeptArtifacts


class CalibrationCache:
    """One object per site, with the rows to search on and the held-out ones.

    A run is on record only once its calibration is made, so that an error in model or data leaves nothing behind: what is to
    be saved before then waits for :meth:`attach`.

    Args:
        config: The run's configuration.
        task: Its model and data.
        kept: Objects of the run; those of other runs are looked through, too. None: the run is not on record yet.
    """

    def __init__(self, config: RunConfig, task: Task, kept: KeptArtifacts | None = None) -> None:
        self._config = config
        self._task = task
        self._kept = kept
        self._waiting: tuple[Sequence[Site], int, Calibration, Calibration] | None = None

    def attach(self, kept: KeptArtifacts) -> None:
        """The run is on record: keep with it what waits."""
        self._kept = kept
        if self._waiting is not None:
            self.save(*self._waiting)
            self._waiting = None

    def key(self, sites: Sequence[Site], rows: int) -> str:
        """Digest of everything that decides the rows and statistics.

        Args:
            sites: Sites that are calibrated.
            rows: Rows kept per site.
        """
        search = self._config.search
        made_from = {
            "model": self._task.loaded.digest,
            "data": self._task.data_digest,
            "sites": [(s.name, s.channels) for s in sites],
            "rows": rows,
            "seed": search.seed,
            "statistic": search.statistic,
            "percentile": search.percentile,
            "batch_size": self._config.data.batch_size,
            "torch": torch.__version__,
        }
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def load(self, sites: Sequence[Site], rows: int) -> tuple[Calibration, Calibration] | None:
        """Both calibrations, or None where an object is missing, damaged or of something else."""
        kept = self._kept
        if kept is None or not sites:
            return None
        found = {artifact.name: artifact for artifact in reversed(kept.find("calibration", self.key(sites, rows)))}
        if any(site.name not in found for site in sites):
            return None
        parts = []
        for site in sites:
            state = kept.load(found[site.name])
            if state is None:
                return None
            parts.append(calibrations_of(state))
        search, held_out = zip(*parts, strict=True)
        return Calibration.merged(search), Calibration.merged(held_out)

    def save(self, sites: Sequence[Site], rows: int, calibration: Calibration, held_out: Calibration) -> None:
        """Keep both calibrations with this run, now or as soon as it is on record."""
        if self._kept is None:
            self._waiting = (sites, rows, calibration, held_out)
            return
        key = self.key(sites, rows)
        states = (
            Keepsake(name=site.name, tensors=calibration_state(calibration, held_out, site.name), key=key)
            for site in sites
        )
        self._kept.put_many("calibration", states)

"""What a run needs before its first search: a model that works, its float metric, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alphasmith.objectives.memory import resident_bytes, resident_model_bytes
from alphasmith.search.calibration_cache import CalibrationCache
from alphasmith.search.compare import score_float
from alphasmith.search.config import RunConfig
from alphasmith.search.interruption import Interrupted, leave
from alphasmith.search.prepare import Prepared, Survey, prepare
from alphasmith.search.progress import Progress
from alphasmith.search.task import Task
from alphasmith.storage.kept import KeptArtifacts


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a run needs before its first search: checked and calibrated, nothing on record yet.

    Attributes:
        prepared: Sites and calibration.
        calibrations: Keeps the calibration once the run is on record.
        float_metric: Task metric of the float model; None where there is none.
        baseline: Memory of the libraries, the model left out [bytes].
    """

    prepared: Prepared
    calibrations: CalibrationCache
    float_metric: float | None
    baseline: int


def begin(
    config: RunConfig,
    task: Task,
    found_sites: Survey,
    progress: Progress,
    stop: Callable[[], bool],
    kept: KeptArtifacts | None = None,
    others: KeptArtifacts | None = None,
) -> Begun:
    """Measure and calibrate. Everything that can be wrong with model and data shows here, before anything is on record.

    Args:
        config: The run's configuration.
        task: Model and data.
        found_sites: Its sites.
        progress: Told what happens.
        stop: Asked again and again whether to leave.
        kept: Objects of the run; None: it is not on record yet.
        others: Objects of other runs, to be looked through until it is; None: there are none.

    Raises:
        InputError: The float metric is not finite; or as ``prepare``.
        Interrupted: ``stop`` said so.
    """
    float_metric = score_float(found_sites.model, task.metric, progress)
    # The prediction starts with the libraries: the model is part of it.
    baseline = resident_bytes() - resident_model_bytes(found_sites.model)
    calibrations = CalibrationCache(config, task, kept, others=others)
    try:
        leave(stop)
        prepared = prepare(config, task, found_sites, progress, calibrations, stop)
    except Interrupted as error:
        if kept is not None:
            raise
        raise Interrupted("interrupted before anything was on record; the same command starts it again") from error
    return Begun(prepared=prepared, calibrations=calibrations, float_metric=float_metric, baseline=baseline)

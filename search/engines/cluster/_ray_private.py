"""All that is used of Ray and private to it: the idle actors of a Tune run, and the actor of a trial.

A test names the versions that this was checked with. Where a later Ray hides one of the names, Tune's own rules hold: actors are
started more often, and nothing else changes.
"""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial


def actor_of(trial: Trial) -> Any | None:
    """Handle of the actor that runs a trial; None where it has none."""
    return trial.temporary_state.ray_actor


def keep_idle(controller: Any, resources: Any, by: int) -> None:
    """Have Tune keep more idle actors of a size.

    Args:
        controller: Tune's controller, as schedulers are given it.
        resources: Placement group factory of a trial.
        by: How many more; fewer where negative.
    """
    cache = getattr(controller, "_actor_cache", None)
    if cache is None:
        return
    if by > 0:
        cache.increase_max(resources, by=by)
    else:
        cache.decrease_max(resources, by=-by)


def next_for_idle_actor(controller: Any) -> Trial | None:
    """The first trial that waits and has no actor of its own that is just starting; None where no actor is idle.

    Raises:
        AttributeError: This Ray hides what is looked at.
    """
    own, manager = controller._trial_to_actor, controller._actor_manager
    if not controller._actor_cache.num_cached_objects:
        return None
    for trial in controller.get_trials():
        if trial.status == Trial.PENDING and not (trial in own and manager.is_actor_started(own[trial])):
            return trial
    return None

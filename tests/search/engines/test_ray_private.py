"""Private names of Ray: there, in a version that was checked, and done without where they are not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

ray = pytest.importorskip("ray", reason="ray is not installed")

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.utils.object_cache import _ObjectCache

from alphasmith.search.engines.cluster._ray_private import actor_of, keep_idle, next_for_idle_actor

#: Versions of Ray whose private names were checked.
CHECKED = ">=2.60,<2.61"


def test_private_names_are_those_that_were_checked() -> None:
    """What ``ray_private`` uses is there, in a version it was checked with. Another version: check, then widen the range."""
    assert SpecifierSet(CHECKED).contains(ray.__version__), f"Ray {ray.__version__} was not checked"
    made = inspect.getsource(TuneController.__init__)
    for name, kind in (("_actor_cache", "_ObjectCache("), ("_actor_manager", ""), ("_trial_to_actor", "")):
        assert f"self.{name}" in made, name
        assert kind in made
    cache = _ObjectCache(may_keep_one=True)
    cache.increase_max("size", by=2)
    cache.decrease_max("size", by=2)
    assert cache.num_cached_objects == 0
    assert callable(RayActorManager.is_actor_started)


def test_a_ray_that_hides_them_is_left_to_its_own_rules() -> None:
    keep_idle(SimpleNamespace(), "size", 3)
    with pytest.raises(AttributeError):
        next_for_idle_actor(SimpleNamespace())


@dataclass(eq=False)
class Waiting:
    """A trial."""

    status: str


def test_an_idle_actor_goes_to_the_first_trial_without_one_that_starts() -> None:
    trials = [Waiting(Trial.RUNNING), Waiting(Trial.PENDING), Waiting(Trial.PENDING)]
    idle = SimpleNamespace(num_cached_objects=1)
    controller = SimpleNamespace(
        _actor_cache=idle,
        _trial_to_actor={trials[1]: "an actor"},
        _actor_manager=SimpleNamespace(is_actor_started=lambda actor: actor == "an actor"),
        get_trials=lambda: trials,
    )
    assert next_for_idle_actor(controller) is trials[2]
    controller._trial_to_actor.clear()
    assert next_for_idle_actor(controller) is trials[1]
    idle.num_cached_objects = 0
    assert next_for_idle_actor(controller) is None


def test_the_actor_of_a_trial() -> None:
    trial = Trial(trainable_name="none", stub=True)
    assert actor_of(trial) is None
    trial.temporary_state.ray_actor = "its actor"
    assert actor_of(trial) == "its actor"

"""Faults around the output folder: drivers that are frozen and replaced while they write, and launches that want the same place."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import invariants
from tests.chaos.children import Child, until
from tests.chaos.faults import FAULTS, fault, is_stopped
from tests.chaos.scenes import LEASE, Cast, Scene, Verdict, World
from tests.chaos.spoils import Spoil

__all__ = ["FAULTS"]

_FOLDER = "alphasmith.storage.output.output_folder:OutputFolder"
_RECORDER = "alphasmith.search.launch.recorder"
#: Where a driver may be frozen while it writes, before and after each.
_WRITING = (
    f"{_RECORDER}:RunRecorder.write",
    f"{_RECORDER}:RunRecorder._write_smoothed",
    f"{_RECORDER}:RunRecorder._write_quantized",
    f"{_FOLDER}.write_tensors",
    f"{_RECORDER}:build_manifest",
    f"{_RECORDER}:render_report",
)
#: From the last file on, to the end of the record.
_PUBLICATION = (
    f"{_FOLDER}._sync_all",
    f"{_FOLDER}._check_whole",
    "alphasmith.storage.queue.board:Board.while_driving",
    "alphasmith.storage.output.reservation:Reservation.check",
    f"{_FOLDER}._publish",
    f"{_RECORDER}:conclude",
    f"{_RECORDER}:_annotate",
    "alphasmith.search.work.session:RunHandle.check_driving",
    "alphasmith.storage.artifacts.run_artifacts:RunArtifacts.forget",
    "alphasmith.storage.runs.run_store:RunStore.finish",
    "alphasmith.storage.queue.board:Board.stop_driving",
)
#: Steps of a successor that finds what its predecessor left.
_SUCCESSION = (
    "alphasmith.search.work.session:RunHandle.discard_partial_output",
    "alphasmith.storage.output.output_folder:discard_partial",
    "alphasmith.search.launch.pipeline:written_before",
)
#: What a process may say that has no right to a run or a place any more, or never had.
_REFUSED = ("was taken over by another process", "is driven by", "is finished", "driven by process", "already exists")


@fault
def frozen_while_writing(world: World, rng: random.Random) -> Verdict:
    """SIGSTOP of a driver while it writes the output folder until it was replaced, and SIGCONT: its successor's result counts."""
    return _replaced(world, rng, _WRITING)


@fault
def replaced_while_publishing(world: World, rng: random.Random) -> Verdict:
    """The same at every step of the publication, inside the transaction of the rename, too; sometimes to the successor as well."""
    return _replaced(world, rng, _PUBLICATION)


@fault
def two_runs_to_one_place(world: World, rng: random.Random) -> Verdict:
    """Two runs with databases of their own want the same output folder: one has it, the other one is told before it searches."""
    cast: Cast = rng.choice(("alone", "server"))
    with Scene(world, cast) as scene, Scene(world, "alone", out=scene.folder / "out") as other:
        first, second = rng.sample((scene, other), 2)
        first.start()
        time.sleep(rng.random() * rng.choice((0.05, 1, 4)))
        second.start()
        refused = _one_is_refused(scene, [first.driver, second.driver])
        loser = next((one for one in (first, second) if one.driver is refused), other)
        winner = scene if loser is other else other
        winner.strike(loser.driver.code == 2 and "driven by" in loser.driver.said)
        winner.wrong += [] if winner is scene else scene.wrong
        if loser.trials:
            winner.wrong.append(f"a launch without a place made {loser.trials} trials")
        return winner.finish(expected=world.expected("site"))


@fault
def two_identical_runs(world: World, rng: random.Random) -> Verdict:
    """The same command twice at once, and sometimes once more after a kill: one run, one driver, nobody searches in vain."""
    with Scene(world, rng.choice(("alone", "server"))) as scene:
        first = scene.start()
        time.sleep(rng.random() * rng.choice((0.02, 0.5, 3)))
        second = scene.start()
        if rng.random() < 0.3:
            scene.until_trials(1 + rng.randrange(20))
            first.kill()
            scene.start()
        refused = _one_is_refused(scene, [first, second])
        scene.strike(refused is not None and "driven by" in refused.said)
        scene.driver.wait()
        if len(found := invariants.run_ids(scene.url)) != 1:
            scene.wrong.append(f"identical launches are {len(found)} runs on record")
            return Verdict(tuple(scene.wrong), scene.struck)
        return scene.finish(expected=world.expected("site"))


def _replaced(world: World, rng: random.Random, moments: Sequence[str]) -> Verdict:
    with Scene(world, "server") as scene:
        first = scene.start(_freeze(rng, moments))
        scene.strike(_froze(first))
        late = [first]
        if first.runs:
            time.sleep(LEASE * 1.5)
            if rng.random() < 0.4:
                # The successor is frozen, too, at its own first steps or where the other one was.
                second = scene.resume(_freeze(rng, (*_SUCCESSION, *moments)))
                if _froze(second):
                    late.append(second)
                    time.sleep(LEASE * 1.5)
                    scene.resume()
            else:
                scene.resume()
            _wake(rng, scene, late)
        for child in late:
            child.send(signal.SIGCONT)
            if child.wait() and not any(word in child.said for word in _REFUSED):
                scene.wrong.append(f"a driver that was replaced ends with code {child.code}: {child.said[-1500:]}")
        scene.driver.wait()
        if scene.driver.code and not any(word in scene.driver.said for word in _REFUSED):
            scene.wrong.append(f"a successor ends with code {scene.driver.code}: {scene.driver.said[-1500:]}")
        scene.look("the driver was replaced while it wrote")
        return scene.finish(expected=world.expected("site"))


def _wake(rng: random.Random, scene: Scene, late: Sequence[Child]) -> None:
    """Let those that were frozen go on at some moment of their successor's life."""
    successor = scene.driver
    moment = rng.choice(("at once", "while it writes", "at its end"))
    if moment == "while it writes":
        partial = scene.folder.glob
        until(lambda: not successor.runs or any(partial("out.partial-*")) or _published(scene.folder), "the successor")
        time.sleep(rng.random() * 0.2)
    elif moment == "at its end":
        successor.wait()
    for child in rng.sample(list(late), len(late)):
        child.send(signal.SIGCONT)


def _published(folder: Path) -> bool:
    return (folder / "out" / "manifest.json").exists()


def _freeze(rng: random.Random, moments: Sequence[str]) -> Spoil:
    return Spoil(kind="signal", at=rng.choice(list(moments)), after=rng.random() < 0.5, number=int(signal.SIGSTOP))


def _froze(child: Child) -> bool:
    until(lambda: not child.runs or is_stopped(child), "the driver to stop itself")
    return child.runs


def _one_is_refused(scene: Scene, rivals: Sequence[Child]) -> Child | None:
    """Wait for both; the one that was told that it cannot. Both may have had their turn, one after the other."""
    refused = None
    for rival in rivals:
        code = rival.wait()
        told = [line for line in rival.said.splitlines() if line.startswith("error:")]
        if code == 2 and len(told) == 1 and any(word in told[0] for word in _REFUSED):
            refused = rival
        elif code not in (0, -signal.SIGKILL):
            scene.wrong.append(f"a second launch ends with code {code}: {rival.said[-1000:]}")
    return refused

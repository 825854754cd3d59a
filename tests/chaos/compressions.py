"""Faults of compressions: processes that are killed in every stage, workers that die or are frozen, and what must hold then."""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.chaos import invariants
from tests.chaos.children import Child, until
from tests.chaos.faults import fault
from tests.chaos.scenes import LEASE, Verdict, World
from tests.chaos.spoils import COMMIT, Spoil
from tests.chaos.subject import COMPRESSED, COMPRESSION

_ROOM = "alphasmith.search.compression"
#: In the middle of a training: at one of so many updates.
_UPDATE, _UPDATES = "torch.optim:AdamW.step", 4
#: Steps of a compression in the order in which they are first come to; in each a process dies, before and after it.
_STEPS = (
    f"{_ROOM}._launch:open_task",
    f"{_ROOM}._stages:model_digest",
    f"{_ROOM}._stages:find_targets",
    "alphasmith.storage.runs.compressions:CompressionStore.create",
    "alphasmith.storage.output.reservation:Reservation.hold",
    "alphasmith.storage.runs.compressions:CompressionStore.move",
    f"{_ROOM}._study:_proposed",
    "alphasmith.storage.queue.trial_claims:TrialClaims.begin",
    "alphasmith.storage.queue.trial_claims:TrialClaims.renew",
    _UPDATE,
    f"{_ROOM}._stages:train_regularised",
    f"{_ROOM}._cache:StageCache.put",
    f"{_ROOM}._stages:pack",
    f"{_ROOM}._stages:finetune_tables",
    f"{_ROOM}._stages:restore",
    f"{_ROOM}._stages:ModelStages.verdict",
    f"{_ROOM}._study:_told",
    "alphasmith.storage.queue.trial_claims:TrialClaims.end",
    f"{_ROOM}._stages:run_rounds",
    f"{_ROOM}._stages:collect_rows",
    f"{_ROOM}._stages:branch_layers",
    f"{_ROOM}.compress:_test",
    f"{_ROOM}.compress:_written",
    f"{_ROOM}._result:render_compression",
    f"{_ROOM}._result:write_compressed",
    f"{_ROOM}._result:load_compressed",
    "alphasmith.storage.output.output_folder:OutputFolder._check_whole",
    "alphasmith.storage.output.output_folder:OutputFolder._publish",
    f"{_ROOM}.compress:annotate_compression",
    f"{_ROOM}.compress:_concluded",
)
#: A compression that must be resumed more often than this does not get on.
_RESUMES = 2 * len(_STEPS) + 6
_TRIALS = int(COMPRESSION["study.trials"])


@dataclass(frozen=True)
class Found:
    """What a compression came to: its trials by their places, and the bytes of the model."""

    trials: tuple[str, ...]
    model: str


class Compression:
    """One compression in processes of its own. Used as a context: at its end they are dead.

    Attributes:
        driver: The process that drives it, or did last.
        struck: Whether what should befall it did.

    Args:
        world: What is shared.
        processes: Worker processes of the driver.
        server: Whether it is on PostgreSQL.

    Raises:
        Missing: There is no server.
    """

    def __init__(self, world: World, *, processes: int = 0, server: bool = False) -> None:
        self._world, self._processes = world, processes
        self._database = f"chaos_{secrets.token_hex(6)}" if server else ""
        self.url = world.server().create(self._database, template="template_chaos") if server else ""
        self.folder = Path(tempfile.mkdtemp(prefix="compression-", dir=world.folder))
        if not server:
            self.url = f"sqlite:///{self.folder}/runs.db"
            shutil.copy(world.template, self.folder / "runs.db")
        self.wrong: list[str] = []
        self.struck = False
        self.resumed = 0
        self._started: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._started:
            if child.runs:
                child.send(signal.SIGCONT)
                child.kill()
        if self._database:
            self._world.server().drop(self._database)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def id(self) -> str:
        """Its id; empty before it is on record."""
        names = [str(row["study_name"]) for row in invariants.read(self.url, "SELECT study_name FROM studies")]
        return names[0].partition("/")[0] if names else ""

    @property
    def status(self) -> str:
        """As recorded; empty before it is."""
        found = invariants.read(self.url, "SELECT value_json FROM study_user_attributes WHERE key = 'alphasmith'")
        return str(json.loads(found[0]["value_json"])["status"]) if found else ""

    def count(self, state: str) -> int:
        """Trials in a state."""
        return len([trial for trial in self.trials() if trial["state"] == state])

    def trials(self) -> list[dict[str, Any]]:
        """Trials by number, with attributes and parameters."""
        rows = [dict(row) for row in invariants.read(self.url, "SELECT * FROM trials ORDER BY number")]
        for table, key, value in (
            ("trial_user_attributes", "key", "value_json"),
            ("trial_params", "param_name", "param_value"),
            ("trial_values", "objective", "value"),
        ):
            told = invariants.read(self.url, f"SELECT * FROM {table}")
            for row in rows:
                row[table] = {str(one[key]): one[value] for one in told if one["trial_id"] == row["trial_id"]}
        return rows

    def start(self, *spoils: Spoil) -> Child:
        """Launch it, or launch it again."""
        settings = [part for name, value in COMPRESSION.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        settings += ["--set", f"workers.lease={LEASE}", "--tolerance", "accuracy=90"]
        places = ["--storage", self.url, "--out", str(self.folder / "out")]
        crew = ["--workers", str(self._processes), "--set", "workers.threads=1"] if self._processes else []
        self.driver = self._child("compress", *settings, *places, *crew, spoils=spoils)
        return self.driver

    def resume(self, *spoils: Spoil, by_id: bool = True) -> Child:
        """Go on with it, by its id or by the command that began it."""
        self.resumed += 1
        if not by_id or not self.status:
            return self.start(*spoils)
        self.driver = self._child("resume", self.id, "--storage", self.url, *_ALLOWED, spoils=spoils)
        return self.driver

    def join(self, *spoils: Spoil) -> Child:
        """One more worker."""
        until(lambda: self.status or not self.driver.runs, "the compression to be on record")
        if not self.status:
            raise AssertionError(f"the driver ended before anything was on record: {self.driver.said[-1500:]}")
        return self._child("worker", self.id, "--storage", self.url, *_ALLOWED, spoils=spoils)

    def worker_pids(self) -> list[int]:
        """Processes that are at a trial."""
        told = [trial["trial_user_attributes"].get("worker") for trial in self.trials() if trial["state"] == "RUNNING"]
        return [int(json.loads(worker).split("/")[1]) for worker in told if worker]

    def finish(self, *, expected: Found | None) -> Verdict:
        """Bring it to its end and check everything.

        Args:
            expected: What the undisturbed one found; None: several workers, which need not find the same.
        """
        while True:
            for child in self._started:
                child.wait()
            if self.status == "finished":
                break
            if self.resumed >= _RESUMES:
                self.wrong.append(f"it is {self.status}: {self.driver.said[-600:]}")
                return Verdict(tuple(self.wrong), self.struck)
            self.resume()
        self.wrong += [f"{c.argv[0]}: {c.said[-2000:]}" for c in self._started if "Traceback" in c.said]
        self.wrong += self._broken()
        if expected is not None and self.found() != expected:
            self.wrong.append(f"found {self.found()} in place of {expected}")
        view = self._child(self.url, str(self.folder / "out"), call="tests.chaos.compressions:product_view")
        if view.wait():
            self.wrong.append(f"the product's own check: {view.said[-1500:]}")
        return Verdict(tuple(self.wrong), self.struck)

    def found(self) -> Found:
        """What it came to."""
        told = []
        for trial in _counted(self.trials()):
            drops = {key: value for key, value in trial["trial_user_attributes"].items() if key.startswith("drop")}
            told.append(json.dumps([trial["state"], trial["trial_params"], trial["trial_values"], drops]))
        model = (self.folder / "out" / "compressed.safetensors").read_bytes()
        return Found(tuple(told), hashlib.sha256(model).hexdigest())

    def _broken(self) -> list[str]:
        """What does not hold of a finished one, by plain SQL."""
        wrong = []
        studies = invariants.read(self.url, "SELECT study_name FROM studies")
        if len(studies) != 1:
            wrong.append(f"{len(studies)} compressions are on record")
        trials = self.trials()
        counted = _counted(trials)
        places = [int(trial["trial_user_attributes"]["place"]) for trial in counted]
        if places != list(range(_TRIALS)):
            wrong.append(f"trials that count have the places {places}")
        if [trial["number"] for trial in trials] != list(range(len(trials))):
            wrong.append("trials are not numbered from 0 without gaps")
        if running := [trial["number"] for trial in trials if trial["state"] == "RUNNING"]:
            wrong.append(f"trials {running} are running")
        manifest = json.loads((self.folder / "out" / "manifest.json").read_text())
        front = sorted(entry["number"] for entry in manifest["front"])
        if front != _front(counted):
            wrong.append(f"the front is {front}, by the records {_front(counted)}")
        tested = invariants.read(self.url, "SELECT value_json FROM study_user_attributes WHERE key = 'tested'")
        if sorted(json.loads(tested[0]["value_json"])) != sorted(["original", *map(str, front)]):
            wrong.append(f"tested are {tested}, the front is {front}")
        if left := [path.name for path in self.folder.glob("out.partial-*")]:
            wrong.append(f"partial output folders were left: {left}")
        return wrong

    def _child(self, *argv: str, spoils: Sequence[Spoil] = (), call: str = "") -> Child:
        child = self._world.zygote.start(*argv, cwd=self.folder, spoils=spoils, call=call)
        self._started.append(child)
        return child


_ALLOWED = ("--allow-code", COMPRESSED)


def _counted(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials that ended by themselves, by their places."""
    kept = [t for t in trials if t["state"] in ("COMPLETE", "PRUNED") or "reason" in t["trial_user_attributes"]]
    return sorted(kept, key=lambda trial: int(trial["trial_user_attributes"]["place"]))


def _front(counted: Sequence[dict[str, Any]]) -> list[int]:
    """Numbers of the feasible trials that no other one beats, of equal ones the first."""
    points = {}
    for trial in counted:
        told = trial["trial_user_attributes"]
        if trial["state"] == "COMPLETE" and all(
            json.loads(v) <= 0 for k, v in told.items() if k.startswith("constraint.")
        ):
            points[trial["number"]] = (
                float(json.loads(told["stored bytes"])),
                float(json.loads(told["drop.accuracy"])),
            )

    def beaten(number: int) -> bool:
        mine = points[number]
        others = [(other, at) for other, at in points.items() if other != number]
        return any(at[0] <= mine[0] and at[1] <= mine[1] and (at != mine or other < number) for other, at in others)

    return sorted(number for number in points if not beaten(number))


def product_view(url: str, folder: str) -> None:
    """What the product itself says of a finished compression: its check of the database, and the digests of its output.

    Raises:
        SystemExit: Something is wrong; it is printed.
    """
    from alphasmith.search.compression.artifact import verify_compressed
    from alphasmith.storage.database.connection import open_existing
    from alphasmith.storage.upkeep.check import violations

    database = open_existing(url)
    found = [str(violation) for violation in violations(database, deep=True)]
    database.close()
    verify_compressed(Path(folder))
    if found:
        raise SystemExit("; ".join(found))


def undisturbed(world: World) -> Found:
    """What a compression that nothing befalls finds, in one process.

    Raises:
        AssertionError: It does not end well.
    """
    with Compression(world) as scene:
        scene.start()
        if wrong := scene.finish(expected=None).wrong:
            raise AssertionError("; ".join(wrong))
        return scene.found()


@fault
def kill_compression_in_every_stage(world: World, rng: random.Random) -> Verdict:
    """kill -9 in every stage of one compression, before or after each step in turn, and in the middle of a training."""
    with Compression(world) as scene:
        for step in _STEPS:
            call = 1 + rng.randrange(_UPDATES) if step == _UPDATE else 1
            scene.resume(Spoil(kind="signal", at=step, call=call, after=rng.random() < 0.5), by_id=rng.random() < 0.7)
            if scene.driver.wait() != -signal.SIGKILL:
                scene.wrong.append(f"it did not come to {step}: {scene.driver.said[-500:]}")
        scene.struck = True
        return scene.finish(expected=world.compressed())


@fault
def kill_compression(world: World, rng: random.Random) -> Verdict:
    """kill -9 of a compression between two commits, at an update of a training or at any moment, up to three times."""
    with Compression(world) as scene:
        scene.start(_anywhere(rng))
        for _ in range(rng.choice((1, 2, 3))):
            if rng.random() < 0.4:
                time.sleep(rng.random() * 3)
                scene.driver.kill()
            scene.struck = scene.driver.wait() == -signal.SIGKILL or scene.struck
            if scene.status == "finished":
                break
            scene.resume(_anywhere(rng), by_id=rng.random() < 0.7)
        return scene.finish(expected=world.compressed())


def _anywhere(rng: random.Random) -> Spoil:
    if rng.random() < 0.5:
        return Spoil(kind="signal", at=COMMIT, call=1 + rng.randrange(120), after=rng.random() < 0.5)
    return Spoil(kind="signal", at=_UPDATE, call=1 + rng.randrange(10 * _UPDATES))


@fault
def kill_compression_worker_process(world: World, rng: random.Random) -> Verdict:
    """kill -9 of worker processes of a compression while its driver lives, and sometimes of the driver, which they must not outlive."""
    with Compression(world, processes=2) as scene:
        scene.start()
        for _ in range(rng.choice((1, 2))):
            pids = until(partial(_at_work, scene), "a worker process to be at a trial")
            time.sleep(rng.random() * 0.3)
            scene.struck = _killed(pids, rng) or scene.struck
        if rng.random() < 0.5:
            scene.driver.kill()
        return scene.finish(expected=None)


@fault
def kill_compression_team(world: World, rng: random.Random) -> Verdict:
    """kill -9 of the driver of a compression or of all its workers, which are processes of their own; one of those that live finishes it."""
    with Compression(world, server=rng.random() < 0.5) as scene:
        scene.start()
        workers = [scene.join(), scene.join()]
        until(lambda: scene.count("COMPLETE") >= rng.randrange(1, _TRIALS) or not scene.driver.runs, "trials")
        time.sleep(rng.random() * 0.2)
        victims = rng.choice(([scene.driver], [workers[0]], [scene.driver, *workers], workers))
        for victim in victims:
            scene.struck = (victim.runs and victim.kill() == -signal.SIGKILL) or scene.struck
        for child in (scene.driver, *workers):
            if child not in victims and child.wait() and "is finished" not in child.said:
                scene.wrong.append(f"{child.argv[0]} ends with code {child.code}: {child.said[-1500:]}")
        if len(victims) < 3 and scene.status != "finished":
            scene.wrong.append("nobody finished it")
        return scene.finish(expected=None)


@fault
def frozen_compression_worker(world: World, rng: random.Random) -> Verdict:
    """SIGSTOP of a worker at a trial until its lease was over and others had its trial, then SIGCONT."""
    # Not on SQLite: a process that is frozen in the middle of a write keeps everybody from writing.
    with Compression(world, server=True) as scene:
        scene.start()
        frozen = scene.join()
        held = until(
            lambda: frozen.pid in scene.worker_pids() or not frozen.runs or scene.status == "finished", "a trial"
        )
        frozen.send(signal.SIGSTOP)
        scene.struck = bool(held) and frozen.runs and frozen.pid in scene.worker_pids()
        scene.driver.wait()
        frozen.send(signal.SIGCONT)
        if frozen.wait() and "is finished" not in frozen.said:
            scene.wrong.append(f"the worker ends with code {frozen.code}: {frozen.said[-1500:]}")
        return scene.finish(expected=None)


def _at_work(scene: Compression) -> list[int] | bool:
    """Worker processes at a trial; True once nothing is to be waited for."""
    return [pid for pid in scene.worker_pids() if pid != scene.driver.pid] or not scene.driver.runs


def _killed(pids: list[int] | bool, rng: random.Random) -> bool:
    if isinstance(pids, bool):
        return False
    try:
        os.kill(rng.choice(pids), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True

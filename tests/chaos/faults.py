"""The faults: each a function that plays one whole scene with one thing going wrong in it, at a seeded moment."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TypeAlias

import psutil

from tests.chaos import invariants
from tests.chaos.children import Child, until
from tests.chaos.scenes import LEASE, Cast, Scene, Verdict, World
from tests.chaos.servers import TinyDisk
from tests.chaos.spoils import COMMIT, How, Spoil
from tests.chaos.subject import FORMATS, METRIC_PLAN, SITES

#: Plays a scene; returns what is wrong at its end, and whether the fault struck: a moment that a seed chooses may come too late.
Fault: TypeAlias = Callable[[World, random.Random], Verdict]

#: Faults by name; the name is what ``--only`` takes.
FAULTS: dict[str, Fault] = {}
#: Trials that a run has on record at least, when it is done.
_TRIALS = 5 * SITES
_HOW: tuple[How, ...] = ("raise", "nan", "memory")
#: Where a process may die while it writes the result, before and after each.
_OUTPUT_MOMENTS = (
    "alphasmith.search.launch.recorder:RunRecorder._write_smoothed",
    "alphasmith.search.launch.recorder:RunRecorder._write_quantized",
    "alphasmith.storage.output.output_folder:OutputFolder._sync_all",
    "alphasmith.storage.output.output_folder:OutputFolder._check_whole",
    "alphasmith.storage.output.output_folder:OutputFolder._publish",
    "alphasmith.storage.runs.run_store:RunStore.conclude",
    "alphasmith.search.launch.recorder:_annotate",
    "alphasmith.storage.artifacts.run_artifacts:RunArtifacts.forget",
    "alphasmith.storage.runs.run_store:RunStore.finish",
)
_STAGE = "alphasmith.search.formats.stage"
_RECORD = "alphasmith.search.formats.record"
_LAUNCH = "alphasmith.search.launch"
_BOTH = (False, True)
#: Steps of the choice of formats in the order in which runs that died in the one before come to them: how many calls there are to
#: draw from, and whether a run dies before the call or after it.
_CHOICE: tuple[tuple[str, int, tuple[bool, ...]], ...] = (
    (f"{_LAUNCH}._formats:choose_formats", 1, (False,)),
    (f"{_STAGE}:predict", 1, _BOTH),
    ("optuna.study:Study.set_metric_names", 1, (True,)),
    (f"{_STAGE}:_Choosing._loss", 1, _BOTH),
    (f"{_RECORD}:insert_trials", 3, _BOTH),
    (f"{_STAGE}:_Choosing._measure", 6, _BOTH),
    (f"{_RECORD}:StoredPlans.add", 6, _BOTH),
    (f"{_STAGE}:held_out_score", 2, _BOTH),
    (f"{_STAGE}:judged", 1, _BOTH),
    (f"{_LAUNCH}._formats:choose_formats", 1, (True,)),
    (f"{_LAUNCH}._outcome:forms_of_front", 1, _BOTH),
    (f"{_LAUNCH}.recorder:RunRecorder._write_quantized", 1, _BOTH),
    (f"{_LAUNCH}.recorder:annotate_formats", 1, _BOTH),
)


def fault(function: Fault) -> Fault:
    """Register a fault under its name, with dashes."""
    FAULTS[function.__name__.replace("_", "-")] = function
    return function


@fault
def kill_driver(world: World, rng: random.Random) -> Verdict:
    """kill -9 of the driver, several times."""
    return _killed_drivers(world, rng, _one(rng, "alone", "server", "model"))


@fault
def kill_driver_choosing_formats(world: World, rng: random.Random) -> Verdict:
    """kill -9 in every step of one choice of formats, before or after it: the front and the model are those of an undisturbed run."""
    with Scene(world, _one(rng, "alone", "server"), settings=FORMATS) as scene:
        for step, calls, sides in _CHOICE:
            scene.resume(Spoil(kind="signal", at=step, call=1 + rng.randrange(calls), after=rng.choice(sides)))
            if scene.driver.wait() != -signal.SIGKILL:
                scene.wrong.append(f"it did not come to {step}: {scene.driver.said[-500:]}")
            scene.look(f"it was killed at {step}")
        scene.strike()
        scene.resume()
        return scene.finish(expected=world.expected("formats"))


@fault
def kill_driver_of_processes(world: World, rng: random.Random) -> Verdict:
    """kill -9 of a driver with worker processes, which must not outlive it."""
    return _killed_drivers(world, rng, "processes")


@fault
def kill_driver_of_team(world: World, rng: random.Random) -> Verdict:
    """kill -9 of a driver whose autonomous workers work on, and one of which writes the result."""
    with Scene(world, "team") as scene:
        scene.begin()
        scene.until_trials(rng.randrange(_TRIALS))
        scene.strike(_killed(scene.driver))
        scene.look("the driver was killed")
        if invariants.count(scene.url, "SELECT count(*) FROM alphasmith_ticket"):  # else there is nothing to work at
            _end_well(scene.workers, scene, "the driver was killed")
        return scene.finish(expected=world.expected("site"))


def _killed_drivers(world: World, rng: random.Random, cast: Cast) -> Verdict:
    with Scene(world, cast) as scene:
        scene.begin()
        reached = 0
        for _ in range(rng.choice((1, 1, 2, 3))):
            # Before the next trial, most of the time: what a process found must not be lost with the next one.
            reached = scene.trials + rng.randrange(1 + _TRIALS // 2)
            scene.until_trials(reached)
            time.sleep(rng.random() * 0.1)
            children = _children(scene.driver)
            scene.strike(_killed(scene.driver))
            until(partial(_gone, children), "worker processes to end with their driver")
            scene.look(f"the driver was killed at {reached} trials")
            if scene.status == "finished":
                break
            scene.resume()
        return scene.finish(expected=world.expected("model" if cast == "model" else "site"))


@fault
def kill_worker_process(world: World, rng: random.Random) -> Verdict:
    """kill -9 of worker processes under a driver that lives: their sites are searched again by others."""
    with Scene(world, "processes") as scene:
        scene.begin()
        for _ in range(rng.choice((1, 2))):
            scene.until_trials(scene.trials + 1 + rng.randrange(_TRIALS // 2))
            children = [child for child in _children(scene.driver) if _lives(child)]
            if children:
                with suppress(psutil.NoSuchProcess):
                    rng.choice(children).kill()
                    scene.strike()
            scene.look("a worker process was killed")
        return scene.finish(expected=world.expected("site"))


@fault
def kill_autonomous_worker(world: World, rng: random.Random) -> Verdict:
    """kill -9 of an autonomous worker: its site is taken over."""
    with Scene(world, "team") as scene:
        scene.begin()
        worker = rng.choice(scene.workers)
        holds = scene.until_holds(worker)
        time.sleep(rng.random() * 0.3)  # a search takes as long as that
        scene.strike(_killed(worker) and holds)
        scene.look("a worker was killed")
        return scene.finish(expected=world.expected("site"))


@fault
def kill_ray_worker(world: World, rng: random.Random) -> Verdict:
    """kill -9 of Ray worker processes in the middle of a search: Tune tries the search again, from what it told."""
    with Scene(world, "ray") as scene:
        scene.begin()
        for _ in range(rng.choice((1, 2))):
            scene.until_trials(scene.trials + 1 + rng.randrange(_TRIALS // 3))
            searching = until(lambda: world.cluster().searching() or not scene.driver.runs, "a search on the cluster")
            if searching is not True:
                with suppress(psutil.NoSuchProcess):
                    rng.choice(searching).kill()
                    scene.strike()
            scene.look("a Ray worker was killed")
        return _undisturbed(world, scene, "a Ray worker was killed")


@fault
def lose_ray_node(world: World, rng: random.Random) -> Verdict:
    """kill -9 of a Ray node: its searches go on at another one."""
    with Scene(world, "ray") as scene:
        scene.begin()
        scene.until_trials(1 + rng.randrange(_TRIALS // 2))
        scene.strike(scene.driver.runs)
        world.cluster().lose_node()
        return _undisturbed(world, scene, "a Ray node was lost")


@fault
def kill_driver_of_ray(world: World, rng: random.Random) -> Verdict:
    """kill -9 of a driver on a Ray cluster; the run is finished there."""
    return _killed_drivers(world, rng, "ray")


@fault
def die_between_commits(world: World, rng: random.Random) -> Verdict:
    """The driver dies right before or right after one of its commits: of a trial, a result, a claim, the plan, the end."""
    cast: Cast = _one(rng, "alone", "server", "model")
    expected = world.expected("model" if cast == "model" else "site")
    commits = world.commits["model" if cast == "model" else "site"]
    with Scene(world, cast) as scene:
        scene.begin(_death_at_commit(rng, commits))
        scene.strike(_died(scene.driver))
        for _ in range(rng.choice((0, 1, 2))):
            scene.look("a death at a commit")
            if scene.status == "finished":
                break
            scene.strike(_died(scene.resume(_death_at_commit(rng, commits // 2))))
        return scene.finish(expected=expected)


@fault
def worker_dies_between_commits(world: World, rng: random.Random) -> Verdict:
    """The same for an autonomous worker."""
    with Scene(world, "team") as scene:
        scene.start()
        dying = scene.join(_death_at_commit(rng, 60))
        scene.join()
        scene.strike(_died(dying))
        scene.look("a worker's death at a commit")
        return scene.finish(expected=world.expected("site"))


@fault
def die_in_final_output(world: World, rng: random.Random) -> Verdict:
    """The driver dies while it writes the folder, at its rename, or between that and the end of the record."""
    cast = _one(rng, "alone", "model")
    with Scene(world, cast) as scene:
        scene.begin(_death_in_output(rng))
        died = _died(scene.driver)
        scene.strike(died)
        scene.look("a death in the final output")
        if died and rng.random() < 0.5:
            scene.resume(_death_in_output(rng)).wait()
        return scene.finish(expected=world.expected("model" if cast == "model" else "site"))


@fault
def server_restarts(world: World, rng: random.Random) -> Verdict:
    """PostgreSQL crashes and comes back some seconds later; nobody has to be started again."""
    with Scene(world, _one(rng, "server", "team")) as scene:
        scene.begin()
        scene.until_trials(rng.randrange(_TRIALS))
        scene.strike(scene.driver.runs)
        world.server().stop()
        time.sleep(rng.random() * 2)
        world.server().start()
        return _undisturbed(world, scene, "the server was restarted")


@fault
def connections_cut(world: World, rng: random.Random) -> Verdict:
    """Every connection to the database is cut, several times; nobody has to be started again."""
    with Scene(world, _one(rng, "server", "team")) as scene:
        scene.begin()
        name = scene.url.rpartition("/")[2]
        for _ in range(4):
            scene.until_trials(scene.trials + 1 + rng.randrange(_TRIALS // 4))
            scene.strike(world.server().cut(name) > 0)
        return _undisturbed(world, scene, "connections were cut")


@fault
def database_locked(world: World, rng: random.Random) -> Verdict:
    """Another process writes to the SQLite file for seconds; the run waits."""
    with Scene(world, _one(rng, "alone", "processes", "model")) as scene:
        scene.begin()
        scene.until_trials(rng.randrange(_TRIALS))
        with closing(sqlite3.connect(scene.folder / "runs.db", timeout=60, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            time.sleep(1 + rng.random() * 4)
            scene.strike(scene.driver.runs)
            other.execute("ROLLBACK")
        return _undisturbed(world, scene, "the database was locked")


@fault
def frozen_worker(world: World, rng: random.Random) -> Verdict:
    """SIGSTOP of an autonomous worker until its site was taken over, and SIGCONT: it writes nothing twice and works on."""
    with Scene(world, "team") as scene:
        scene.begin()
        worker = rng.choice(scene.workers)
        scene.until_holds(worker)
        time.sleep(rng.random() * 0.2)
        return _frozen(world, scene, worker)


@fault
def frozen_worker_process(world: World, rng: random.Random) -> Verdict:
    """SIGSTOP of a worker process for longer than a lease, and SIGCONT: its driver waits for it, nobody takes its site."""
    with Scene(world, "processes") as scene:
        scene.begin()
        scene.until_trials(1 + rng.randrange(_TRIALS // 2))
        with suppress(psutil.NoSuchProcess):
            if children := [child for child in _children(scene.driver) if _lives(child)]:
                frozen = rng.choice(children)
                frozen.suspend()
                scene.strike()
                time.sleep(2 * LEASE)
                scene.look("a worker process was frozen")
                frozen.resume()
        return _undisturbed(world, scene, "a worker process was frozen")


@fault
def frozen_in_a_transaction(world: World, rng: random.Random) -> Verdict:
    """SIGSTOP of an autonomous worker right before one of its commits: its locks must not hold the others up."""
    with Scene(world, "team") as scene:
        scene.start()
        before_commit = Spoil(kind="signal", at=COMMIT, call=1 + rng.randrange(40), number=int(signal.SIGSTOP))
        frozen = scene.join(before_commit)
        scene.join()
        until(lambda: not frozen.runs or is_stopped(frozen), "the worker to stop itself")
        scene.strike(frozen.runs)
        until(lambda: scene.status == "finished", "the others to finish the run")
        frozen.send(signal.SIGCONT)
        return _undisturbed(world, scene, "a worker was frozen inside a transaction")


@fault
def frozen_driver(world: World, rng: random.Random) -> Verdict:
    """The same for the driver, whose right to write the result a worker takes over."""
    with Scene(world, "team") as scene:
        scene.begin()
        scene.until_trials(1 + rng.randrange(_TRIALS))
        driver = scene.driver
        scene.strike(driver.runs)
        driver.send(signal.SIGSTOP)
        if rng.random() < 0.5:
            time.sleep(LEASE * 2)
        else:  # until the others have written the result
            until(lambda: not any(worker.runs for worker in scene.workers), "the workers to end")
        driver.send(signal.SIGCONT)
        if driver.wait() and "taken over" not in driver.said:
            scene.wrong.append(f"a driver that was frozen ends with code {driver.code}: {driver.said[-1000:]}")
        _end_well(scene.workers, scene, "the driver was frozen")
        scene.look("the driver was frozen")
        return scene.finish(expected=world.expected("site"))


@fault
def clock_jumps(world: World, rng: random.Random) -> Verdict:
    """The wall clock of one process jumps by an hour while it works, forwards or backwards."""
    zygote = world.moody_zygote()
    cast = _one(rng, "alone", "team")
    with Scene(world, cast) as scene:
        shift = scene.folder / "shift"
        shift.write_text("0")
        moody = {"CHAOS_CLOCK": str(shift)}
        if cast == "team":
            scene.start()
            scene.join(zygote=zygote, environment=moody)
        else:
            scene.zygote, scene.environment = zygote, moody
            scene.start()
        scene.until_trials(1 + rng.randrange(_TRIALS))
        moved = scene.workers[-1] if cast == "team" else scene.driver
        scene.strike(moved.runs)
        shift.write_text(rng.choice(("3600", "-3600")))
        if cast == "alone" and rng.random() < 0.5:
            scene.until_trials(scene.trials + 3)
            scene.driver.kill()
            shift.write_text("0")
            scene.look("the clock jumped and the driver was killed")
            return scene.finish(expected=world.expected("site"))
        return _undisturbed(world, scene, "the clock jumped")


@fault
def disk_full(world: World, rng: random.Random) -> Verdict:
    """The device of the output folder, or of database and artifacts, is full: one line, nothing half written, resumable."""
    for_output = rng.random() < 0.5
    room = 24 * 2**20
    with TinyDisk(2**12 * rng.randrange(1, 40) if for_output else 2**20 + rng.randrange(2**20)) as disk:
        if for_output:
            scene = Scene(world, "alone", out=disk.path / "out")
        else:
            (disk.path / "runs.db").write_bytes(world.template.read_bytes())
            scene = Scene(world, "alone", url=f"sqlite:///{disk.path}/runs.db")
        with scene:
            scene.start()
            code = scene.driver.wait()
            scene.strike(code != 0)
            said = [line for line in scene.driver.said.splitlines() if line.startswith("error:")]
            if code not in (1, 2) or len(said) != 1:
                scene.wrong.append(f"a full disk ends with code {code}: {scene.driver.said[-1500:]}")
            if for_output and (left := [path.name for path in disk.path.iterdir()]):
                scene.wrong.append(f"a full disk leaves {left}")
            disk.grow(room)
            scene.look("the disk was full")
            return scene.finish(expected=world.expected("site"))


@fault
def damaged_results(world: World, rng: random.Random) -> Verdict:
    """Objects of accepted results are deleted or damaged between the driver's death and the resumption."""
    with Scene(world, _one(rng, "alone", "server")) as scene:
        scene.begin()
        scene.until_done(1 + rng.randrange(SITES - 1))
        scene.driver.kill()
        if scene.status != "finished":
            for file in rng.sample(results := sorted(scene.results()), 1 + rng.randrange(min(2, len(results)))):
                scene.strike()
                if rng.random() < 0.5:
                    file.unlink()
                else:
                    file.write_bytes(file.read_bytes()[:-1])
            scene.resume()
        return scene.finish(expected=world.expected("site"))


@fault
def two_drivers(world: World, rng: random.Random) -> Verdict:
    """Two processes resume one run at once: one drives it, the other is told so in one line."""
    with Scene(world, _one(rng, "alone", "server")) as scene:
        scene.begin()
        scene.until_trials(1 + rng.randrange(_TRIALS))
        if rng.random() < 0.5:
            scene.driver.kill()
        rivals = [scene.resume(), scene.resume()]
        codes = sorted(rival.wait() for rival in rivals)
        for rival in rivals:
            refused = "is driven by" in rival.said or "is finished" in rival.said
            scene.strike("is driven by" in rival.said)
            if rival.code != 0 and not (rival.code == 2 and refused):
                scene.wrong.append(f"a second driver ends with code {rival.code}: {rival.said[-1000:]}")
        if codes == [2, 2] and scene.status not in ("finished", "running"):
            scene.wrong.append("two drivers refused each other")
        return scene.finish(expected=world.expected("site"))


@fault
def eight_open_an_empty_database(world: World, rng: random.Random) -> Verdict:
    """Eight processes open an empty database at once; all of them can use it."""
    cast: Cast = _one(rng, "alone", "server")
    if cast == "server":
        name = f"chaos_empty_{rng.randrange(2**40):x}"
        url = world.server().create(name)
    else:
        name, url = "", f"sqlite:///{world.folder}/empty-{rng.randrange(2**40):x}/runs.db"
    try:
        with Scene(world, cast, url=url) as scene:
            openers = [scene.call("tests.chaos.spoils:open_empty", url) for _ in range(8)]
            for opener in openers:
                if opener.wait():
                    scene.wrong.append(f"an opener ended with code {opener.code}: {opener.said[-1500:]}")
            scene.strike()
            scene.start()
            return scene.finish(expected=world.expected("site"))
    finally:
        if name:
            world.server().drop(name)


@fault
def bad_candidates(world: World, rng: random.Random) -> Verdict:
    """A candidate at a site raises, scores NaN or exhausts memory: a failed trial with its reason, and the run goes on."""
    how: How = rng.choice(_HOW)
    with Scene(world, _one(rng, "alone", "processes")) as scene:
        scene.begin(Spoil(kind="candidates", how=how, call=1 + rng.randrange(20)))
        return _undisturbed(world, scene, f"candidates: {how}", bad_candidates=True)


@fault
def memory_runs_out_once(world: World, rng: random.Random) -> Verdict:
    """A batch of candidates finds no memory once; tried again, nothing is lost."""
    with Scene(world, "alone") as scene:
        scene.begin(Spoil(kind="candidates", how="memory once", call=1 + rng.randrange(20)))
        scene.driver.wait()
        scene.strike(scene.spoiled)
        return _undisturbed(world, scene, "memory ran out once")


@fault
def bad_metric(world: World, rng: random.Random) -> Verdict:
    """The user's metric raises, returns NaN or exhausts memory for a candidate model."""
    how = rng.choice(_HOW)
    # The first call scores the float model, the next ones the grid of single alphas; then come the candidates.
    with Scene(world, "model", environment={METRIC_PLAN: f"{rng.randrange(7, 14)}:{how}"}) as scene:
        scene.begin()
        return _undisturbed(world, scene, f"metric: {how}", bad_candidates=True)


@fault
def asked_to_stop(world: World, rng: random.Random) -> Verdict:
    """SIGINT or SIGTERM: the run is marked as interrupted, says how to go on, and does."""
    with Scene(world, _one(rng, "alone", "processes", "server", "model")) as scene:
        scene.begin()
        scene.until_trials(rng.randrange(_TRIALS))
        number = rng.choice((signal.SIGINT, signal.SIGTERM))
        scene.driver.send(number)
        code = scene.driver.wait()
        status = scene.status
        early = code == 130 and not status and "the same command starts it again" in scene.driver.said
        if not early and (code, status) not in ((130, "interrupted"), (0, "finished")):
            scene.wrong.append(f"{number.name} ends with code {code}, run {status}: {scene.driver.said[-1000:]}")
        scene.strike(code == 130)
        if code == 130 and not early and "alphasmith resume" not in scene.driver.said:
            scene.wrong.append(f"{number.name}: nobody is told how to go on: {scene.driver.said[-500:]}")
        scene.look(number.name)
        return scene.finish(expected=world.expected("model" if scene.cast == "model" else "site"))


def _undisturbed(world: World, scene: Scene, after: str, *, bad_candidates: bool = False) -> Verdict:
    """Every process must come to its end by itself, with success."""
    _end_well((scene.driver, *scene.workers), scene, after)
    scene.look(after)
    if bad_candidates and scene.spoiled:
        scene.strike()
        if not invariants.count(scene.url, "SELECT count(*) FROM trials WHERE state = 'FAIL'"):
            scene.wrong.append(f"after {after} no trial failed")
    expected = None if bad_candidates else world.expected("model" if scene.cast == "model" else "site")
    return scene.finish(expected=expected, bad_candidates=bad_candidates)


def _end_well(children: Sequence[Child], scene: Scene, after: str) -> None:
    for child in children:
        if child.wait():
            scene.wrong.append(f"after {after} {child.argv[0]} ended with code {child.code}: {child.said[-1500:]}")


def _frozen(world: World, scene: Scene, worker: Child) -> Verdict:
    worker.send(signal.SIGSTOP)
    lost = f"SELECT count(*) FROM alphasmith_attempt WHERE state <> 'running' AND worker LIKE '%/{worker.pid}/%'"
    before = invariants.count(scene.url, lost)
    if scene.holds(worker):
        until(
            lambda: invariants.count(scene.url, lost) > before or scene.status == "finished",
            "the site to be taken over",
        )
        scene.strike(invariants.count(scene.url, lost) > before)
    else:
        time.sleep(LEASE * 2)
    scene.look("a worker was frozen")
    worker.send(signal.SIGCONT)
    return _undisturbed(world, scene, "a worker was frozen beyond its lease")


def _death_at_commit(rng: random.Random, commits: int) -> Spoil:
    return Spoil(kind="signal", at=COMMIT, call=1 + rng.randrange(commits), after=rng.random() < 0.5)


def _death_in_output(rng: random.Random) -> Spoil:
    return Spoil(kind="signal", at=rng.choice(_OUTPUT_MOMENTS), after=rng.random() < 0.5)


def _killed(child: Child) -> bool:
    """kill -9; whether it was that which ended it."""
    return child.kill() == -signal.SIGKILL


def _died(child: Child) -> bool:
    """Wait for its end; whether a kill -9 was that."""
    return child.wait() == -signal.SIGKILL


def is_stopped(child: Child) -> bool:
    """Whether a process is frozen."""
    try:
        return bool(psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def _one(rng: random.Random, *casts: Cast) -> Cast:
    return rng.choice(casts)


def _children(driver: Child) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def _gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(map(_lives, processes))


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

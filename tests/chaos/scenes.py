"""Scenes: a small run in processes of its own, whatever befalls it, its end, and what must hold then."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from tests.chaos import invariants
from tests.chaos.children import Child, Zygote, until
from tests.chaos.invariants import Outcome
from tests.chaos.servers import PostgreSql, RayCluster, clock_library
from tests.chaos.spoils import Spoil
from tests.chaos.subject import FORMATS, MARK, allowed, options

if TYPE_CHECKING:
    from tests.chaos.compressions import Found

#: ``alone``: in one process; on SQLite, or ``server``: on PostgreSQL. ``processes``: a driver with two worker processes, on
#: SQLite. ``team``: a driver and two autonomous workers on PostgreSQL. ``model``: one study over the whole model, scored by a
#: metric. ``ray``: searched on a Ray cluster.
Cast = Literal["alone", "server", "processes", "team", "model", "ray"]

#: What an undisturbed run is of: its sites, the whole model, or its sites with a choice of formats.
Subject = Literal["site", "model", "formats"]
#: Lease of the processes of a scene [s]: what is frozen for longer counts as dead.
LEASE = 2
#: What every batch of candidates takes longer in a team [s]: on this small a model one worker would do all.
PACE = Spoil(kind="pace", seconds=0.05)
#: A run that must be resumed more often than this does not get on.
_RESUMES = 6


@dataclass(frozen=True)
class Verdict:
    """How a scene ended: what is wrong, nothing if all is well, and whether what should befall it did."""

    wrong: tuple[str, ...]
    struck: bool


class World:
    """What scenes share: the process that forks theirs, a server, undisturbed runs to compare with. Used as a context."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.template = self.folder / "template.db"
        self.zygote = self._stack.enter_context(Zygote())
        self._prepare(f"sqlite:///{self.template}")
        self.commits: dict[Subject, int] = {}
        # Computed once each.
        self.server = cache(self._server)
        self.moody_zygote = cache(self._moody_zygote)
        self.cluster = cache(lambda: self._stack.enter_context(RayCluster()))
        self.expected = cache(self._expected)
        self.compressed = cache(self._compressed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _server(self) -> PostgreSql:
        server = self._stack.enter_context(PostgreSql())
        self._prepare(server.create("template_chaos"))
        return server

    def _prepare(self, url: str) -> None:
        """Make the tables that scenes begin with, once."""
        made = self.zygote.start(url, cwd=self.folder, call="tests.chaos.spoils:open_empty")
        if made.wait():
            raise AssertionError(made.said)

    def _moody_zygote(self) -> Zygote:
        """One whose children have a wall clock that a file moves: ``CHAOS_CLOCK`` names it.

        Raises:
            Missing: There is no C compiler.
        """
        return self._stack.enter_context(Zygote({"LD_PRELOAD": str(clock_library(self.folder))}))

    def _expected(self, of: Subject) -> Outcome:
        """What an undisturbed run finds; where it is searched and kept changes nothing."""
        cast: Cast = "model" if of == "model" else "alone"
        with Scene(self, cast, settings=FORMATS if of == "formats" else None) as scene:
            counted = scene.folder / "commits"
            scene.start(Spoil(kind="count", at=str(counted)))
            if scene.driver.wait():
                raise AssertionError(scene.driver.said)
            if wrong := scene.finish(expected=None).wrong:
                raise AssertionError("; ".join(wrong))
            self.commits[of] = int(counted.read_text())
            with invariants.snapshot(scene.url) as found:
                return invariants.outcome(found)

    def _compressed(self) -> Found:
        """What an undisturbed compression finds."""
        from tests.chaos.compressions import undisturbed

        return undisturbed(self)


class Scene:
    """One run. Used as a context: at its end its processes are dead and its database is gone.

    Attributes:
        folder: Its files.
        url: Its database.
        driver: The process that drives it, or did last.
        workers: Autonomous workers.
        wrong: What was found wrong so far.
        struck: Whether what should befall it did.
        environment: Of its processes.

    Args:
        world: What is shared.
        cast: Which processes take part.
        zygote: What forks them, if not the world's.
        url: Address of its database; empty: a new one.
        settings: More settings, ``section__field``.
        out: Output folder; None: in the scene's folder.
        environment: Of all its processes.
    """

    def __init__(
        self,
        world: World,
        cast: Cast,
        *,
        zygote: Zygote | None = None,
        settings: Mapping[str, object] | None = None,
        out: Path | None = None,
        environment: dict[str, str] | None = None,
        url: str = "",
    ) -> None:
        self.world = world
        self.cast = cast
        self.zygote = zygote or world.zygote
        self.folder = Path(tempfile.mkdtemp(prefix=f"{cast}-", dir=world.folder))
        self.wrong: list[str] = []
        self.struck = False
        self.workers: list[Child] = []
        self.resumed = 0
        self._out = out or self.folder / "out"
        self._settings = dict(settings or {})
        self.environment = dict(environment or {})
        self._started: list[Child] = []
        self._database = ""
        if url:
            self.url = url
        elif cast in ("server", "team"):
            self._database = f"chaos_{secrets.token_hex(6)}"
            self.url = world.server().create(self._database, template="template_chaos")
        else:
            self.url = f"sqlite:///{self.folder}/runs.db"
            shutil.copy(world.template, self.folder / "runs.db")
        if cast == "ray":
            self.environment |= {"RAY_ADDRESS": world.cluster().address}
        if cast == "model":
            self._settings |= {
                "search__scope": "model",
                "search__loss": "task",
                "data__metric": "tests.chaos.subject:metric",
            }

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
            self.world.server().drop(self._database)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def run(self) -> str:
        """Id of its run, once that is on record."""
        return str(until(lambda: invariants.run_ids(self.url), "the run to be on record")[0])

    @property
    def trials(self) -> int:
        """Trials on record."""
        return invariants.count(self.url, "SELECT count(*) FROM trials")

    @property
    def done(self) -> int:
        """Sites that are done."""
        return invariants.count(self.url, "SELECT count(*) FROM alphasmith_ticket WHERE state = 'done'")

    @property
    def status(self) -> str:
        """Of the run; empty while it cannot be read."""
        for status in ("finished", "failed", "interrupted", "running", "created"):
            if invariants.count(self.url, f"SELECT count(*) FROM alphasmith_run WHERE status = '{status}'"):
                return status
        return ""

    @property
    def spoiled(self) -> bool:
        """Whether a candidate or the metric was spoiled in any of its processes."""
        return any(self.folder.glob(f"{MARK}*"))

    def strike(self, happened: bool = True) -> None:
        """Note that what should befall the scene did, if it ``happened``."""
        self.struck = self.struck or happened

    def results(self) -> list[Path]:
        """Objects of its accepted results."""
        with invariants.snapshot(self.url) as found:
            ids = {str(row["artifact_id"]) for row in found.results}
        return [path for path in self.folder.rglob("*") if path.name in ids]

    def begin(self, *spoils: Spoil) -> None:
        """Start all processes of the cast; ``spoils`` are the driver's."""
        self.start(*spoils)
        if self.cast == "team":
            for _ in range(2):
                self.join()

    def start(self, *spoils: Spoil) -> Child:
        """Launch the run; its driver becomes ``driver``."""
        options_ = options(workers__lease=LEASE, **self._settings)
        return self._drive("run", *options_, *self._engine(), "--out", str(self._out), spoils=spoils)

    def resume(self, *spoils: Spoil) -> Child:
        """Go on with it, or launch it again if it died before it was on record; its driver becomes ``driver``."""
        self.resumed += 1
        if not invariants.run_ids(self.url):
            return self.start(*spoils)
        return self._drive("resume", self.run, *self._engine(), *allowed(), spoils=spoils)

    def join(self, *spoils: Spoil, zygote: Zygote | None = None, environment: dict[str, str] | None = None) -> Child:
        """One more autonomous worker."""
        command = ("worker", self.run, "--storage", self.url, *allowed())
        worker = self._child(*command, spoils=(PACE, *spoils), zygote=zygote, environment=environment)
        self.workers.append(worker)
        return worker

    def call(self, function: str, *arguments: str) -> Child:
        """Call ``module:function`` in a process of its own."""
        return self._child(*arguments, call=function)

    def until_trials(self, count: int) -> None:
        """Wait until so many trials are on record, or until the run has ended or its driver has."""
        until(lambda: self.trials >= count or self._over(), f"{count} trials")

    def until_done(self, count: int) -> None:
        """Wait until so many sites are done, or until the run has ended or its driver has."""
        until(lambda: self.done >= count or self._over(), f"{count} sites")

    def holds(self, worker: Child) -> bool:
        """Whether a site is held by this process."""
        held = f"SELECT count(*) FROM alphasmith_ticket WHERE state = 'running' AND worker LIKE '%/{worker.pid}/%'"
        return invariants.count(self.url, held) > 0

    def until_holds(self, worker: Child) -> bool:
        """Wait until this process holds a site, or until the run has ended; whether it holds one."""
        until(lambda: self.holds(worker) or self.status == "finished" or self._over(), "a site to be held")
        return self.holds(worker)

    def look(self, after: str) -> None:
        """Check what must hold at any moment."""
        if not invariants.run_ids(self.url):
            return  # the fault came before there was anything to check
        with invariants.snapshot(self.url) as found:
            self.wrong += [f"after {after}: {sentence}" for sentence in invariants.at_any_moment(found)]

    def finish(self, *, expected: Outcome | None, bad_candidates: bool = False, driven: bool = True) -> Verdict:
        """Bring the run to its end and check everything.

        Args:
            expected: What the undisturbed run found; None: do not compare.
            bad_candidates: Whether trials may have failed.
            driven: Whether it is resumed where nobody works on it any more.

        """
        self._finish(expected=expected, bad_candidates=bad_candidates, driven=driven)
        return Verdict(tuple(self.wrong), self.struck)

    def _finish(self, *, expected: Outcome | None, bad_candidates: bool, driven: bool) -> None:
        while True:
            for child in self._started:
                child.wait()
            if self.status == "finished":
                break
            if not driven or self.resumed >= _RESUMES:
                said = self.driver.said[-600:]
                self.wrong.append(f"run is {self.status}, its driver left with code {self.driver.code}: {said}")
                return
            self.resume()
        self.wrong += [
            f"{child.argv[0]} (code {child.code}) told of a crash: {child.said[-2500:]}"
            for child in self._started
            if "Traceback" in child.said
        ]
        self.wrong += invariants.when_finished(self.url, expected=expected, bad_candidates=bad_candidates)
        view = self.world.zygote.start(
            self.url,
            str(self._out),
            cwd=self.folder,
            call="tests.chaos.spoils:product_view",
            environment=self.environment,
        )
        if view.wait():
            self.wrong.append(f"the product's own check: {view.said[-1500:]}")

    def _over(self) -> bool:
        return not self.driver.runs and not any(worker.runs for worker in self.workers)

    def _engine(self) -> tuple[str, ...]:
        match self.cast:
            case "processes":
                return ("--storage", self.url, "--workers", "2")
            case "ray":
                return ("--storage", self.url, "--engine", "ray")
            case _:
                return ("--storage", self.url)

    def _drive(self, *argv: str, spoils: Sequence[Spoil]) -> Child:
        pace = (PACE,) if self.cast == "team" else ()
        self.driver = self._child(*argv, spoils=(*pace, *spoils))
        return self.driver

    def _child(
        self,
        *argv: str,
        spoils: Sequence[Spoil] = (),
        call: str = "",
        zygote: Zygote | None = None,
        environment: dict[str, str] | None = None,
    ) -> Child:
        started = (zygote or self.zygote).start(
            *argv, cwd=self.folder, spoils=spoils, call=call, environment=self.environment | (environment or {})
        )
        self._started.append(started)
        return started

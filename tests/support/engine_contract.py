"""What every engine keeps, whatever its workers are: inherit from ``EngineContract`` and say how to open one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alphasmith.objectives.errors import AlphasmithError
from alphasmith.objectives.judge.model_objective import ModelLoss
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.engines import perform as real
from alphasmith.search.engines.types import Engine, ModelWork, OnMessage, SearchEnd, SiteWork
from alphasmith.search.interruption import never
from alphasmith.search.study.study_record import SentLog, StudyMessage, StudyNote, StudyPast, StudyTrials
from tests.objectives.judge.test_model_objective import media, spoiled
from tests.support.engine_scripts import FACTS, PATIENCE, Fatal, script, site_work
from tests.support.quantized_models import block_example

ROOT = Path(__file__).parents[2]


class MessageLog:
    """Keeps what searches told, and which of them ended."""

    def __init__(self) -> None:
        self.messages: dict[str, list[StudyMessage]] = {}
        self.ended: dict[str, SearchEnd] = {}

    def __call__(self, site: str, message: StudyMessage) -> None:
        """Hear."""
        assert site not in self.ended, "a message after the end of its search"
        self.messages.setdefault(site, []).append(message)

    def until(self, engine: Engine, enough: Callable[[], bool], hear: OnMessage | None = None) -> None:
        """Wait for it, and require that every search ends once."""
        deadline = time.monotonic() + PATIENCE
        while not enough():
            assert time.monotonic() < deadline, f"ended so far: {self.ended}"
            for end in engine.wait(hear or self, 0.2):
                assert end.site not in self.ended
                self.ended[end.site] = end

    def run(self, engine: Engine, works: list[SiteWork], hear: OnMessage | None = None) -> None:
        """Submit all as slots get free, until all have ended."""
        waiting = list(works)

        def given() -> bool:
            while waiting and engine.slots > 0:
                engine.submit(waiting.pop(0))
            return not waiting and {w.site for w in works} <= self.ended.keys()

        self.until(engine, given, hear)

    def notes(self, site: str) -> dict[str, Any]:
        """Facts told by a search."""
        return {m.name: m.value for m in self.messages.get(site, []) if isinstance(m, StudyNote)}


def plain(message: StudyMessage) -> Any:
    """A message without times."""
    if isinstance(message, StudyTrials):
        return message.first, [(t.number, t.params, t.value, t.state) for t in message.trials]
    return message


def same_result(ours: SearchEnd, other: SearchEnd) -> bool:
    """Whether two searches found the same."""
    a, b = ours.result, other.result
    if a is None or b is None:
        return False
    same = (a.candidate, a.held_out, a.search, a.ranges) == (b.candidate, b.held_out, b.search, b.ranges)
    return same and torch.equal(a.scales, b.scales) and torch.equal(a.labels, b.labels)


def model_work(loss: ModelLoss = "mse") -> ModelWork:
    """A small model, and forty samples in twenty batches."""
    example = block_example()
    return ModelWork(
        model=copy.deepcopy(example.model),
        sites=example.sites,
        ranges=example.ranges,
        scheme=site_work("any").settings.scheme,
        skip=(),
        batches=media(20),
        loss=loss,
    )


def race_candidates() -> tuple[dict[str, Smoothing], dict[str, Smoothing]]:
    """A good and a bad one."""
    return {}, spoiled(block_example(), 1e3)


class EngineContract:
    """The tests. ``engine`` is shared by those that leave it as it was.

    Attributes:
        scripted: Whether searches run in processes of their own and follow ``engine_scripts.perform``.
    """

    scripted = True

    @classmethod
    def open(cls, count: int) -> Engine:
        """An engine of ``count`` workers on the CPU that search with ``engine_scripts.PERFORM``."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> Iterator[Engine]:
        """Two workers."""
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT)  # for workers to find this folder
            engine = cls.open(2)
            try:
                yield engine
            finally:
                engine.close()

    def own_processes(self) -> None:
        """Skip what takes workers that can die."""
        if not self.scripted:
            pytest.skip("searches run in this process")

    def test_every_search_ends_once_and_finds_what_it_finds_alone(self, engine: Engine) -> None:
        works = [site_work(f"site {seed}", seed=seed) for seed in range(5)]
        assert 0 < engine.slots < len(works)
        heard = MessageLog()
        heard.run(engine, works)
        assert engine.wait(heard, 60.0) == []  # nothing is held, nothing is waited for
        for work in works:
            alone: list[StudyMessage] = []
            log = SentLog(StudyPast(), alone.append)
            expected = real.perform(work, log, device=None, stop=never)
            assert same_result(heard.ended[work.site], expected)
            assert [plain(m) for m in heard.messages[work.site]] == [plain(m) for m in alone]
            assert any(isinstance(m, StudyTrials) for m in alone)

    def test_a_search_goes_on_from_what_is_recorded(self, engine: Engine) -> None:
        first, second = MessageLog(), MessageLog()
        work = site_work("site")
        first.run(engine, [work])
        past = StudyPast()
        for message in first.messages["site"]:
            past = past.after(message)
        second.run(engine, [SiteWork(**{**vars(work), "past": past})])
        assert same_result(first.ended["site"], second.ended["site"])
        assert not any(isinstance(m, StudyTrials) for m in second.messages.get("site", []))

    def test_a_search_that_fails_says_why_and_is_not_lost(self, engine: Engine) -> None:
        heard = MessageLog()
        heard.run(engine, [site_work("bad", value=float("nan")), site_work("good")])
        end = heard.ended["bad"]
        assert (end.result, end.lost, end.stopped) == (None, False, False)
        assert end.reason
        assert "\n" not in end.reason
        assert heard.ended["good"].result is not None

    def test_wait_ends_in_time_while_searches_go_on(self, engine: Engine, tmp_path: Path) -> None:
        self.own_processes()
        heard = MessageLog()
        slots = engine.slots
        closed = tmp_path / "closed"
        closed.touch()
        engine.submit(script("door", str(closed)))
        heard.until(engine, lambda: bool(heard.messages))
        assert engine.slots < slots
        assert engine.wait(heard, 0.05) == []
        assert engine.wait(heard, 0.0) == []
        closed.unlink()
        heard.until(engine, lambda: bool(heard.ended))
        assert engine.slots == slots

    def test_a_killed_worker_loses_its_search_and_nothing_else(self, engine: Engine) -> None:
        self.own_processes()
        heard = MessageLog()
        heard.run(engine, [script("die", "fatal"), site_work("other")])
        end = heard.ended["fatal"]
        assert end.lost
        assert end.result is None
        assert end.reason
        # What it told before it died arrived.
        assert [m.name for m in heard.messages["fatal"] if isinstance(m, StudyNote)] == list(FACTS)
        assert heard.ended["other"].result is not None
        heard.run(engine, [site_work(f"next {number}") for number in range(3)])
        assert all(heard.ended[f"next {number}"].result is not None for number in range(3))

    def test_a_race_of_the_workers_is_that_of_the_judge(self, engine: Engine) -> None:
        good, bad = race_candidates()
        middle = spoiled(block_example(), 1.5)
        judge = model_work().judge("cpu")
        racer = engine.racer(judge, model_work)
        candidates = [bad, good, middle, good, bad]
        expected = judge.race(candidates, protected=5)
        for _ in range(2):  # the second time with the models the workers have
            scores = racer.race(candidates, protected=5)
            assert [s.loss for s in scores] == pytest.approx([s.loss for s in expected], rel=1e-9)
            assert [s.samples for s in scores] == [s.samples for s in expected]
            for score, one in zip(scores, expected, strict=True):
                assert torch.allclose(score.errors, one.errors, rtol=1e-9)
        incumbent = judge.sample_errors(good)
        scores = racer.race([bad, bad, bad, bad, good], incumbent=incumbent, protected=2)
        assert [s.stopped for s in scores] == [False, False, True, True, False]
        assert scores[4].loss == pytest.approx(judge.loss(good), rel=1e-9)
        assert racer.race([]) == []

    def test_a_race_survives_its_workers(self, engine: Engine, tmp_path: Path) -> None:
        self.own_processes()
        work = model_work(Fatal(tmp_path / "calls", deaths=2))
        racer = engine.racer(work.judge("cpu"), lambda: work)
        assert [s.loss for s in racer.race([{}, {}, {}])] == [0.25] * 3

    @pytest.mark.slow
    def test_a_race_that_kills_every_worker_is_an_error(self, engine: Engine, tmp_path: Path) -> None:
        self.own_processes()
        work = model_work(Fatal(tmp_path / "calls", deaths=1000))
        with pytest.raises(AlphasmithError, match="candidate"):
            engine.racer(work.judge("cpu"), lambda: work).race([{}])
        heard = MessageLog()
        heard.run(engine, [site_work("after")])
        assert heard.ended["after"].result is not None

    def test_stop_ends_searches_in_good_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(ROOT)
        engine = self.open(1)
        heard = MessageLog()

        def hear(site: str, message: StudyMessage) -> None:
            heard(site, message)
            engine.stop()

        try:
            heard.run(engine, [script("wait") if self.scripted else site_work("site", trials=50)], hear)
            assert heard.ended["site"] == SearchEnd(site="site", stopped=True)
            assert engine.wait(heard, 60.0) == []
        finally:
            engine.close()
            engine.close()

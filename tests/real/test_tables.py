"""Tables and the check of the benchmark of real models, on findings made up here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.real_judges import Judged, Measure
from benchmarks.real_models import broken_promises, difference, text
from benchmarks.real_runs import CONTESTANTS, Contestant, Finding, Request

SAMPLES = 40
NOISE = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
#: Mean error of a sample under each contestant.
LEVELS: dict[Contestant, float] = {"none": 9.0, "alpha 0.5": 5.0, "one alpha": 3.0, "best single": 2.5, "ours": 2.0}


def judged(level: float) -> Judged:
    return Judged(level + NOISE, 100.0, (level / 10 + NOISE / 100,))


def finding(seed: int = 0, *, without: Contestant | None = None, **levels: float) -> Finding:
    others = {name.replace("_", " "): level for name, level in levels.items()}
    return Finding(
        request=Request(
            model="MiniLM", scheme="w8a8-channel-static", seed=seed, short=True, sweep=False, home=Path("models")
        ),
        measures=(Measure(name="perplexity", higher_is_better=False, exponential=True),),
        float_model=Judged(torch.zeros(SAMPLES, dtype=torch.float64), 100.0, (NOISE / 100,)),
        judged={name: judged(others.get(name, LEVELS[name])) for name in CONTESTANTS if name != without},
        one_alpha=0.85,
        kept="ours",
        own_losses={},
        sites=25,
        wall=100.0,
        cpu=50.0,
        sweep=5.0,
        peak=1 << 30,
    )


def test_a_baseline_above_breaks_nothing() -> None:
    assert list(broken_promises(finding())) == []
    assert list(broken_promises(finding(ours=LEVELS["best single"]))) == [], "equal to the best is kept to"


def test_a_baseline_below_is_named_with_both_losses() -> None:
    (sentence,) = broken_promises(finding(ours=2.7))
    assert "MiniLM w8a8-channel-static, seed 0" in sentence
    assert "'best single'" in sentence
    assert f"{float((2.7 + NOISE).sum()) / 100:.4g}" in sentence


def test_what_lies_within_the_scatter_breaks_nothing() -> None:
    scattered = finding()
    swing = torch.tensor(
        [1.0, -0.9] * (SAMPLES // 2), dtype=torch.float64
    )  # above on average, by less than it scatters
    ours = Judged(scattered.judged["best single"].errors + swing, 100.0, scattered.judged["ours"].values)
    inside = finding()
    inside = Finding(**{**vars(inside), "judged": {**inside.judged, "ours": ours}})
    assert ours.loss > scattered.judged["best single"].loss
    assert list(broken_promises(inside)) == []


def test_a_model_that_broke_down_breaks_the_promise() -> None:
    (sentence,) = broken_promises(finding(without="ours"))
    assert "no output loss" in sentence
    assert list(broken_promises(finding(without="none"))) == [], "a baseline may break down"


@pytest.mark.parametrize("exponential", [False, True])
def test_a_difference_is_that_of_the_metric(exponential: bool) -> None:
    measure = Measure(name="any", higher_is_better=False, exponential=exponential)
    ours, other = (level + NOISE for level in (0.1, 0.2))
    change, error = (float(part) for part in difference(measure, ours, other).split(" ± "))
    assert change == pytest.approx(measure.value(ours) - measure.value(other), abs=1e-4)
    assert error == pytest.approx(0.0, abs=1e-4), "paired: what both have in common does not scatter"


def test_an_exponential_scatters_as_its_value() -> None:
    mean, exponential = (Measure(name="any", higher_is_better=False, exponential=e) for e in (False, True))
    ours, other = 3 + NOISE, torch.full_like(NOISE, 3)
    errors: list[float] = [float(difference(m, ours, other).split(" ± ")[1]) for m in (mean, exponential)]
    assert errors[1] == pytest.approx(errors[0] * math.exp(float(ours.mean())), rel=1e-2)


def test_tables_hold_means_over_the_seeds_and_every_violation() -> None:
    group = [finding(0), finding(1, ours=4.0), finding(2, ours=3.0)]
    shown = text([group], ["DINOv2: nothing is here"], "Machine: any.")
    assert "2 of 3" in shown
    assert f"{float((3.0 + NOISE).sum()) / 100:.5f}" in shown
    assert "of best single" in shown
    assert "Not run: DINOv2: nothing is here." in shown
    assert {len(line.split("|")) for line in shown.splitlines() if line.startswith("| MiniLM")} == {10, 11}


def test_values_of_a_contestant_that_failed_once_are_no_mean() -> None:
    shown = text([[finding(0), finding(1, without="none")]], [], "Machine: any.")
    lines = [line for line in shown.splitlines() if line.startswith("| MiniLM") and "failed" in line]
    assert len(lines) == 2

"""Signal metrics: known values, what is left out and counted, and what must not be hidden."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.metrics import scores
from alphasmith.objectives.joint.metrics._signals import CAP, si_sdr, snr
from alphasmith.objectives.joint.metrics.scores import Score, require, score
from alphasmith.objectives.literals import SignalMetric

RATE = 10_000
GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn(RATE, generator=GENERATOR)
#: Bursts of a tone with harmonics: enough like speech to have frames that are no silence.
TIME = torch.arange(RATE) / RATE
TONES = torch.stack([torch.sin(2 * math.pi * 150 * k * TIME) / k for k in range(1, 9)])
SPEECH = TONES.sum(0) * (0.6 + 0.4 * torch.sin(20 * TIME))


@pytest.mark.parametrize("level", [30.0, 10.0, 0.0, -10.0])
def test_decibels_are_those_of_the_noise(level: float) -> None:
    orthogonal = NOISE - SPEECH * (NOISE @ SPEECH) / (SPEECH @ SPEECH)
    noise = orthogonal * SPEECH.norm() / orthogonal.norm() * 10 ** (-level / 20)
    assert snr(SPEECH + noise, SPEECH) == pytest.approx(level, abs=1e-3)
    assert si_sdr(SPEECH + noise, SPEECH) == pytest.approx(level, abs=1e-3)
    assert si_sdr(0.01 * (SPEECH + noise), SPEECH) == pytest.approx(level, abs=1e-3)


def test_perfect_and_empty_outputs_have_bounds() -> None:
    assert snr(SPEECH, SPEECH) == si_sdr(SPEECH, SPEECH) == CAP
    assert snr(1e9 * SPEECH, SPEECH) == -CAP
    assert si_sdr(torch.zeros(RATE), SPEECH) == -CAP
    assert snr(torch.zeros(2, 3), torch.ones(2, 3)) == 0


def test_stoi_falls_with_noise() -> None:
    values = [score("stoi", [SPEECH + a * NOISE], [SPEECH], rate=RATE).value or 0.0 for a in (0.0, 0.3, 3.0)]
    assert values[0] == pytest.approx(1.0, abs=1e-6)
    assert values[0] > values[1] > values[2] > 0


def test_what_cannot_be_measured_is_left_out_and_counted() -> None:
    nan = SPEECH.clone()
    nan[3] = math.nan
    pairs = [
        (SPEECH + NOISE, SPEECH), (SPEECH, SPEECH), (SPEECH[:-1], SPEECH), (NOISE, nan), (NOISE, torch.zeros(RATE)),
        (NOISE, torch.full((RATE,), 1e-8)), (NOISE[:3000], SPEECH[:3000]), (NOISE.reshape(2, -1), SPEECH.reshape(2, -1)),
    ]  # fmt: skip
    outputs, references = [list(part) for part in zip(*pairs, strict=True)]
    found = score("stoi", outputs, references, rate=RATE)
    assert (found.measured, found.identical) == (2, 1)
    assert found.left_out == {
        "another shape than the reference": 1,
        "reference not finite": 1,
        "silent reference": 2,
        "shorter than 0.4 s": 1,
        "more than one channel": 1,
    }
    assert str(found).startswith("stoi 0.")
    assert str(found).count("left out (") == 1
    assert score("snr", outputs, references).measured == 5, "any shape and length, and silence is exactly zero"


def test_too_few_frames_of_speech_are_left_out() -> None:
    click = torch.zeros(RATE)
    click[5000:5300] = 1.0
    found = score("stoi", [NOISE, SPEECH], [click, SPEECH], rate=RATE)
    assert found.left_out == {"too little speech": 1}
    assert found.measured == 1


def test_a_silent_output_counts_with_the_lowest_value() -> None:
    silent = torch.zeros(RATE)
    for metric, lowest in (("stoi", 0.0), ("si_sdr", -CAP), ("snr", 0.0)):
        found = score(metric, [silent], [SPEECH], rate=RATE)  # type: ignore[arg-type]
        assert (found.value, found.measured) == (lowest, 1)


@pytest.mark.parametrize("metric", ["snr", "si_sdr", "stoi"])
def test_an_output_that_is_not_finite_is_an_error(metric: SignalMetric) -> None:
    with pytest.raises(NonFiniteError, match="output 1 holds NaN"):
        score(metric, [SPEECH, SPEECH * math.nan], [SPEECH, SPEECH], rate=RATE)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"outputs": [], "references": []}, "data"),
        ({"outputs": [SPEECH]}, "data"),
        ({"metric": "stoi"}, "data.rate"),
        ({"metric": "mos"}, "metrics"),
        ({"references": [torch.zeros(RATE)] * 2}, "data"),
    ],
)
def test_wrong_data_are_named(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        score(**({"metric": "snr", "outputs": [SPEECH] * 2, "references": [SPEECH] * 2} | arguments))
    assert caught.value.field == field


def test_pesq_is_shown_as_not_measured_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    found = score("pesq", [SPEECH], [SPEECH], rate=16000)
    assert found == Score(metric="pesq", value=None, measured=0, identical=0, left_out={}, note=scores.NO_PESQ)
    assert str(found).startswith("pesq not measured (PESQ is not installed; install alphasmith[pesq]")
    with pytest.raises(
        InputError, match=r"^metrics: PESQ is not installed; install alphasmith\[pesq\].*external commercial use"
    ):
        require("pesq")
    require("stoi")


def test_pesq_needs_one_of_its_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"^data\.rate: PESQ knows no rate of 10000 Hz; resample to 8000 or 16000 Hz"):
        score("pesq", [SPEECH], [SPEECH], rate=RATE)


@pytest.mark.skipif(find_spec("pesq") is None, reason="the extra pesq is not installed")
def test_pesq_falls_with_noise() -> None:
    values = [score("pesq", [SPEECH + a * NOISE], [SPEECH], rate=8000).value or 0.0 for a in (0.0, 0.3)]
    assert values[0] > 4 > values[1] >= 1
    assert score("pesq", [torch.zeros(8000)], [SPEECH[:8000]], rate=8000).value == scores.PESQ_BOTTOM

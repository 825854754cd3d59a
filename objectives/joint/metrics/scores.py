"""Signal metrics over many outputs, guarded: what cannot be measured is left out and counted. Source: claim B-3.

STOI is that of pystoi. PESQ is that of the package pesq, an optional extra that is never installed by default: it bundles C code of the ITU
whose notice forbids external commercial use.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import get_args

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.metrics._signals import si_sdr, snr
from alphasmith.objectives.literals import SignalMetric
from alphasmith.objectives.text import counted

#: Largest value of a waveform that counts as silence, full scale being 1.
SILENCE = 1e-6
#: Shortest waveform [s]: STOI compares windows of 0.384 s, PESQ needs a quarter of a second.
SHORTEST = {"stoi": 0.4, "pesq": 0.25}
#: Sampling rates of PESQ [Hz] and its mode there: narrow or wide band.
PESQ_MODES = {8000: "nb", 16000: "wb"}
#: Lowest value of PESQ's scale of mean opinions, taken for a silent output, which the package refuses.
PESQ_BOTTOM = 1.0
NO_PESQ = "PESQ is not installed; install alphasmith[pesq] if its licence allows your use (no external commercial use)"


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric over many outputs.

    Attributes:
        metric: Which.
        value: Mean over what was measured [dB for snr and si_sdr]; None where nothing could be, which is shown as "not measured".
        measured: Outputs that count.
        identical: Outputs among them that are their reference.
        left_out: Why -> how many outputs do not count.
        note: Why there is no value at all; empty where there is one.
    """

    metric: SignalMetric
    value: float | None
    measured: int
    identical: int
    left_out: Mapping[str, int]
    note: str = ""

    def __str__(self) -> str:
        """The value with its counts, e.g. ``stoi 0.912 of 8 outputs, 1 left out (silent reference)``."""
        if self.value is None:
            return f"{self.metric} not measured ({self.note})"
        told = f"{self.metric} {self.value:.4g} of {counted(self.measured, 'output')}"
        if self.left_out:
            told += f", {sum(self.left_out.values())} left out ({', '.join(self.left_out)})"
        return told


def require(metric: SignalMetric) -> None:
    """Refuse a metric whose package is missing: for a condition that would never hold without it.

    Raises:
        InputError: It is PESQ and the extra is not installed, or there is no such metric.
    """
    if metric not in get_args(SignalMetric):
        known = ", ".join(get_args(SignalMetric))
        raise InputError("metrics", f"{metric!r} is unknown", f"use some of {known}")
    if metric == "pesq" and find_spec("pesq") is None:
        raise InputError("metrics", "PESQ is not installed", NO_PESQ.partition("; ")[2] + ", or leave pesq out")


def score(
    metric: SignalMetric, outputs: Sequence[Tensor], references: Sequence[Tensor], *, rate: int | None = None
) -> Score:
    """Measure outputs against their references.

    Left out and counted: another shape than the reference's, a reference that is not finite or is silent, too short a waveform, more
    than one channel, and speech that PESQ cannot find or STOI has too few frames of. An output that is silent where its reference
    is not counts with the lowest value: leaving it out would praise a model that says nothing.

    Args:
        metric: ``snr`` (any shape), ``si_sdr``, ``stoi`` or ``pesq`` (waveforms (T,) or (1, T)).
        outputs: What a model made.
        references: What it should have made, as many.
        rate: Sampling rate of waveforms [Hz]; needed for ``stoi`` and ``pesq``.

    Returns:
        The mean over what could be measured. Without the extra, PESQ has no value and a note.

    Raises:
        InputError: There are no outputs or not as many as references, the rate is missing or not one of PESQ's, or every
            output is left out.
        NonFiniteError: A model made NaN or infinity.
    """
    if metric == "pesq" and find_spec("pesq") is None:
        return Score(metric=metric, value=None, measured=0, identical=0, left_out={}, note=NO_PESQ)
    require(metric)
    _check(metric, outputs, references, rate)
    values: list[float] = []
    left_out: Counter[str] = Counter()
    identical = 0
    for number, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        reason = _unusable(metric, output, reference, rate)
        if not reason and not bool(torch.isfinite(output).all()):
            raise NonFiniteError(f"output {number} holds NaN or infinity")
        found = math.nan if reason else _MEASURES[metric](output, reference, rate or 0)
        if math.isnan(found):
            left_out[reason or "too little speech"] += 1
            continue
        values.append(found)
        identical += int(torch.equal(output, reference))
    if not values:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        raise InputError("data", f"{metric} cannot be measured on any output ({reasons})", "give other data")
    return Score(
        metric=metric,
        value=sum(values) / len(values),
        measured=len(values),
        identical=identical,
        left_out=dict(left_out),
    )


def _check(metric: str, outputs: Sequence[Tensor], references: Sequence[Tensor], rate: int | None) -> None:
    if not outputs or len(outputs) != len(references):
        problem = f"{counted(len(outputs), 'output')} for {counted(len(references), 'reference')}"
        raise InputError("data", problem, "give one reference for every output")
    if metric in SHORTEST and (rate is None or rate <= 0):
        raise InputError("data.rate", f"{metric} needs the sampling rate", "give it in Hz")
    if metric == "pesq" and rate not in PESQ_MODES:
        raise InputError("data.rate", f"PESQ knows no rate of {rate} Hz", "resample to 8000 or 16000 Hz")


def _unusable(metric: str, output: Tensor, reference: Tensor, rate: int | None) -> str:
    """Why a pair does not count; empty where it may."""
    if output.shape != reference.shape:
        return "another shape than the reference"
    if not bool(torch.isfinite(reference).all()):
        return "reference not finite"
    if metric == "snr":
        return "" if bool(reference.any()) else "silent reference"
    if reference.dim() == 0 or reference.numel() != reference.shape[-1]:
        return "more than one channel"
    if metric in SHORTEST and reference.shape[-1] < SHORTEST[metric] * (rate or 0):
        return f"shorter than {SHORTEST[metric]} s"
    return "" if float(reference.abs().max()) > SILENCE else "silent reference"


def _stoi(output: Tensor, reference: Tensor, rate: int) -> float:
    """NaN where pystoi finds too few frames, for which it returns 1e-5 and a warning."""
    measure = importlib.import_module("pystoi").stoi
    if float(output.abs().max()) <= SILENCE:
        return 0.0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        value = float(measure(reference.reshape(-1).double().numpy(), output.reshape(-1).double().numpy(), rate))
    few = any(issubclass(one.category, RuntimeWarning) and "frames" in str(one.message) for one in told)
    return math.nan if few else value


def _pesq(output: Tensor, reference: Tensor, rate: int) -> float:
    """NaN where the package finds no speech in the reference."""
    package = importlib.import_module("pesq")
    if float(output.abs().max()) <= SILENCE:
        return PESQ_BOTTOM
    try:
        return float(package.pesq(rate, reference.reshape(-1).numpy(), output.reshape(-1).numpy(), PESQ_MODES[rate]))
    except package.PesqError:
        return math.nan


_MEASURES: dict[str, Callable[[Tensor, Tensor, int], float]] = {
    "snr": lambda output, reference, _rate: snr(output, reference),
    "si_sdr": lambda output, reference, _rate: si_sdr(output, reference),
    "stoi": _stoi,
    "pesq": _pesq,
}

"""Voiced and unvoiced signals in noise, generated: what the embedded speech-enhancement model is trained and measured on.

A clip is a row of syllables: a harmonic sound under three moving formants, a burst of band-limited noise before or after it, a pause.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alphasmith.objectives.training.sampler import place_seed

RATE = 8000
#: Samples of a clip: one and a half seconds.
LENGTH = 12_000
#: Smallest and largest ratio of signal to noise [dB].
SNR = (-3.0, 9.0)
#: Ranges of the three formants [Hz] and their bandwidths [Hz].
_FORMANTS = ((300.0, 800.0, 80.0), (900.0, 2200.0, 120.0), (2300.0, 3200.0, 180.0))


def pairs(seed: int, purpose: str, count: int) -> tuple[Tensor, Tensor]:
    """(count, LENGTH) noisy and clean clips, float32 within -1 and 1; those of two purposes have nothing in common.

    Args:
        seed: Of all clips.
        purpose: What they are for.
        count: How many.
    """
    made = [_pair(torch.Generator().manual_seed(place_seed(seed, place, purpose))) for place in range(count)]
    return torch.stack([noisy for noisy, _ in made]), torch.stack([clean for _, clean in made])


def _pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    clean = _speech(generator)
    noise = _noise(generator)
    ratio = _between(generator, *SNR)
    noise = noise * (clean.square().mean() / noise.square().mean() / 10 ** (ratio / 10)).sqrt()
    noisy = clean + noise
    size = 0.9 / max(float(noisy.abs().max()), float(clean.abs().max()))
    return noisy * size, clean * size


def _speech(generator: torch.Generator) -> Tensor:
    out = torch.zeros(LENGTH)
    pitch = _between(generator, 90.0, 230.0)
    at = int(_between(generator, 0.0, 0.1) * RATE)
    while at < LENGTH - RATE // 10:
        if _between(generator, 0.0, 1.0) < 0.5:
            at = _added(out, at, _unvoiced(generator, _between(generator, 0.04, 0.1)))
        at = _added(out, at, _voiced(generator, pitch, _between(generator, 0.12, 0.3)))
        at += int(_between(generator, 0.0, 1.0) ** 2 * 0.2 * RATE)
    return out


def _added(out: Tensor, at: int, part: Tensor) -> int:
    """Add a part at a place; returns the place behind it."""
    part = part[: len(out) - at]
    out[at : at + len(part)] += part
    return at + len(part)


def _voiced(generator: torch.Generator, pitch: float, seconds: float) -> Tensor:
    """Harmonics of a gliding pitch under three gliding formants."""
    count = int(seconds * RATE)
    time = torch.arange(count) / RATE
    glide = torch.linspace(_between(generator, 0.9, 1.1), _between(generator, 0.9, 1.1), count)
    wobble = 1 + 0.01 * torch.sin(2 * math.pi * _between(generator, 4.0, 7.0) * time)
    frequency = pitch * glide * wobble
    phase = 2 * math.pi * torch.cumsum(frequency, 0) / RATE
    orders = torch.arange(1, int(0.48 * RATE / pitch) + 1).unsqueeze(1)
    partials = orders * frequency
    gain = torch.zeros_like(partials)
    for low, high, width in _FORMANTS:
        centre = torch.linspace(_between(generator, low, high), _between(generator, low, high), count)
        gain += 1 / (1 + ((partials - centre) / width) ** 2)
    gain = gain * (partials < 0.48 * RATE) / orders**0.5
    return _enveloped((gain * torch.sin(orders * phase)).sum(0), 0.02) * _between(generator, 0.6, 1.2)


def _unvoiced(generator: torch.Generator, seconds: float) -> Tensor:
    """A burst of noise in one band."""
    count = int(seconds * RATE)
    spectrum = torch.fft.rfft(torch.randn(count, generator=generator))
    bins = torch.linspace(0, RATE / 2, len(spectrum))
    centre, width = _between(generator, 1500.0, 3500.0), _between(generator, 400.0, 1200.0)
    shaped = torch.fft.irfft(spectrum / (1 + ((bins - centre) / width) ** 4), n=count)
    return _enveloped(shaped / shaped.abs().max(), 0.01) * _between(generator, 0.2, 0.5)


def _enveloped(wave: Tensor, seconds: float) -> Tensor:
    """A wave that fades in and out."""
    count = min(int(seconds * RATE), len(wave) // 2)
    fade = 0.5 - 0.5 * torch.cos(math.pi * torch.arange(count) / count)
    out = wave.clone()
    out[:count] *= fade
    out[len(out) - count :] *= fade.flip(0)
    return out


def _noise(generator: torch.Generator) -> Tensor:
    """Noise whose spectrum falls by up to 9 dB an octave and whose level wanders."""
    spectrum = torch.fft.rfft(torch.randn(LENGTH, generator=generator))
    tilt = _between(generator, 0.0, 1.5)
    shaped = spectrum / (1 + torch.arange(len(spectrum)) / 40) ** tilt
    level = torch.randn(8, generator=generator).mul(0.35).exp()
    smooth = torch.nn.functional.interpolate(level[None, None], size=LENGTH, mode="linear", align_corners=True)
    found: Tensor = torch.fft.irfft(shaped, n=LENGTH) * smooth[0, 0]
    return found


def _between(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

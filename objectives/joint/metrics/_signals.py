"""Signal to noise of one output against its reference. Source: claim B-3."""

from __future__ import annotations

import math

from torch import Tensor

#: Bounds of both measures [dB]: an output equal to its reference, and one that has nothing of it.
CAP = 100.0


def snr(output: Tensor, reference: Tensor) -> float:
    """Signal-to-noise ratio ``10 log10(sum ref^2 / sum (ref - out)^2)`` [dB], within -100 and 100.

    Args:
        output: Any shape: an image, a spectrogram, a waveform.
        reference: The same shape, not all zeros.
    """
    wanted = reference.detach().double()
    return _ratio(float(wanted.square().sum()), float((wanted - output.detach().double()).square().sum()))


def si_sdr(output: Tensor, reference: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio [dB], within -100 and 100. Source: Le Roux et al. 2019, arXiv 1811.02508.

    ``10 log10(|a s|^2 / |a s - y|^2)``, y the output, s the reference, ``a = <y, s> / |s|^2``; no mean is taken out.

    Args:
        output: (T,) waveform.
        reference: (T,), not all zeros.
    """
    wanted, found = reference.detach().double().reshape(-1), output.detach().double().reshape(-1)
    target = wanted * (found @ wanted / (wanted @ wanted))
    return _ratio(float(target.square().sum()), float((target - found).square().sum()))


def _ratio(signal: float, noise: float) -> float:
    if signal <= 0:
        return -CAP
    if noise <= 0:
        return CAP
    return min(max(10 * math.log10(signal / noise), -CAP), CAP)

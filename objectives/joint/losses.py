"""What a model in float is trained on: task losses by name. Source: claim B-1; the sum with both sparsity terms is formula fB3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import TaskLoss

#: (output, reference) -> scalar loss.
Loss = Callable[[Tensor, Tensor], Tensor]
#: Energy of a waveform below which it counts as silent, and the smallest that a ratio divides by: full scale is 1.
_SILENT = 1e-8


def task_loss(name: TaskLoss, *, fft_sizes: Sequence[int] = (256, 512, 1024)) -> Loss:
    """A loss by its name.

    Args:
        name: ``si_sdr``: the negative scale-invariant signal-to-distortion ratio [dB], see :func:`si_sdr_loss`. ``mr_stft``:
            :class:`StftLoss`. ``mse``: the mean squared error. ``cross_entropy``: of class scores (B, K, ...) against classes (B, ...) int64.
        fft_sizes: Window lengths of ``mr_stft`` [samples].

    Raises:
        InputError: There is no such loss, or no window.
    """
    if name not in get_args(TaskLoss):
        raise InputError("loss", f"{name!r} is unknown", f"use one of {', '.join(get_args(TaskLoss))}")
    return StftLoss(fft_sizes) if name == "mr_stft" else _LOSSES[name]


def si_sdr_loss(output: Tensor, reference: Tensor) -> Tensor:
    """Mean of the negative SI-SDR [dB] over a batch, with gradients. Source: Le Roux et al. 2019, arXiv 1811.02508.

    Clips whose reference is silent have none and are left out of the mean.

    Args:
        output: (B, T) waveforms.
        reference: (B, T).

    Raises:
        InputError: Shapes differ, or every reference is silent.
    """
    _same(output, reference)
    energy = reference.square().sum(-1)
    heard = energy > _SILENT
    if not bool(heard.any()):
        raise InputError("data", "every reference of a batch is silent", "give clips with a signal")
    output, reference, energy = output[heard], reference[heard], energy[heard]
    target = reference * ((output * reference).sum(-1) / energy).unsqueeze(-1)
    wanted, wrong = target.square().sum(-1), (target - output).square().sum(-1)
    # A share of the energies is added to both: a perfect or a silent output has a finite loss and gradient.
    least = _SILENT * energy
    return -10 * torch.log10((wanted + least) / (wrong + least)).mean()


class StftLoss:
    """Spectral convergence and log magnitudes at several window lengths, by auraloss. Source: Yamamoto et al. 2020, arXiv 1910.11480.

    Args:
        fft_sizes: Window lengths [samples]; a window moves by a quarter of its length.

    Raises:
        InputError: There is no window, or one is too short.
    """

    def __init__(self, fft_sizes: Sequence[int]) -> None:
        from auraloss.freq import MultiResolutionSTFTLoss  # a second of imports that only this loss needs

        if not fft_sizes or min(fft_sizes) < 4:
            raise InputError("loss.fft_sizes", f"{tuple(fft_sizes)} are no windows", "give lengths such as 256, 512")
        sizes = [int(size) for size in fft_sizes]
        self._longest = max(sizes)
        self._measure: Any = MultiResolutionSTFTLoss(sizes, [size // 4 for size in sizes], sizes)

    def __call__(self, output: Tensor, reference: Tensor) -> Tensor:
        """() loss of waveforms (B, T).

        Args:
            output: What a model made.
            reference: What it should have made.

        Raises:
            InputError: Shapes differ, or clips are shorter than half of the longest window.
        """
        _same(output, reference)
        if output.shape[-1] <= self._longest // 2:
            problem = f"clips of {output.shape[-1]} samples are too short for a window of {self._longest}"
            raise InputError("loss.fft_sizes", problem, "give longer clips, or shorter windows")
        return torch.as_tensor(self._measure(output.unsqueeze(1), reference.unsqueeze(1)))


def _same(output: Tensor, reference: Tensor) -> None:
    if output.shape != reference.shape:
        problem = f"the model returned {tuple(output.shape)} for a reference {tuple(reference.shape)}"
        raise InputError("data", problem, "give references of the output's length")


def _mse(output: Tensor, reference: Tensor) -> Tensor:
    _same(output, reference)
    return F.mse_loss(output, reference)


_LOSSES: dict[str, Loss] = {"si_sdr": si_sdr_loss, "mse": _mse, "cross_entropy": F.cross_entropy}

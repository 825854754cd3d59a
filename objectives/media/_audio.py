"""Audio files, by the model's own feature extractor where it has one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from scipy.signal import resample_poly

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media._bounds import (
    AUDIO_FORMATS,
    MOST_SAMPLES,
    MOST_STREAM_BYTES,
    RATES,
    Content,
    audio_format,
    check_file,
    check_settings,
)
from alphasmith.objectives.media._source import MediaSource, is_transformers_config, setting
from alphasmith.objectives.media._targets import file_targets
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.media.batches import MediaBatches, lengths_in_common
from alphasmith.objectives.reading import is_regular, read_object, refusing
from alphasmith.objectives.text import counted, listed

_DEFAULT_RATE = 16000


def load_audio(
    source: MediaSource, files: list[Path], *, model_folder: Path | None, model_config: Any, seed: int
) -> MediaBatches:
    """Audio as batches of features, or of mono waveforms (B, samples) in [-1, 1].

    Nothing is padded here, so that no silence of ours enters the statistics: clips of one length share a batch. Those of nearly
    one length are cut to the shortest of them, which keeps at least four fifths of each, unless the extractor makes all of
    one length or a decoder writes down what it hears.

    Args:
        source: What to read.
        files: Audio files; ``source.samples`` of them are drawn from ``seed``.
        model_folder: Folder with a feature extractor; without one the waveform is passed on as it is.
        model_config: The model's configuration.
        seed: Draws the samples and their order.

    Raises:
        InputError: A file is no readable audio, is empty, holds a non-finite sample, or the rates contradict.
    """
    extractor = load_extractor(model_folder)
    rate, notes = model_rate(source, extractor, model_config)
    chosen = [files[i] for i in source.drawn(len(files), np.random.default_rng(seed))]
    sounds = [sound_of(file) for file in chosen]
    lengths = [sound.samples(source.seconds, rate) for sound in sounds]
    notes += _resampled([sound.rate for sound in sounds], rate)
    fixed = _is_fixed(extractor, rate)
    if not fixed and not setting(model_config, "is_encoder_decoder", False):
        lengths = lengths_in_common(lengths)

    def load(numbers: tuple[int, ...]) -> Batch:
        waves = [read_wave(chosen[i], rate, source.seconds, lengths[i]) for i in numbers]
        return waves_batch(waves, rate, extractor, model_config)

    targets = file_targets(source, chosen)
    return MediaBatches.of(
        len(chosen), source.batch_size, load, alike=[] if fixed else lengths, targets=targets, notes=notes
    )


def waves_batch(waves: list[npt.NDArray[np.float32]], rate: int, extractor: Any, config: Any) -> Batch:
    """Waveforms as the model takes them.

    Args:
        waves: (samples,) each, of one length unless the extractor makes all of one length.
        rate: Their rate [Hz].
        extractor: The model's feature extractor, or None.
        config: The model's configuration.

    Raises:
        InputError: The extractor fails.
    """
    if extractor is None:
        wave = torch.from_numpy(np.stack(waves))
        if not is_transformers_config(config):
            return Batch(args=(wave,))
        kwargs = {"input_values": wave}
    else:
        with _extracting():
            out = extractor(waves, sampling_rate=rate, return_tensors="pt")
        kwargs = {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}
    return Batch(kwargs=kwargs)


def load_extractor(folder: Path | None) -> Any:
    """The feature extractor of a model's folder; None where it has none.

    Raises:
        InputError: Its settings cannot be used.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    if folder is None or not any(is_regular(folder / name) for name in names):
        return None
    from transformers import AutoFeatureExtractor

    for name in names:
        if is_regular(folder / name):
            check_settings(folder / name, read_object(folder / name, field="model.path"))
    with refusing("model.path", f"the feature extractor in {folder} cannot be loaded", "repair or remove it"):
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def model_rate(source: MediaSource, extractor: Any, config: Any) -> tuple[int, tuple[str, ...]]:
    """Rate of the waveforms that a model takes [Hz], and what was assumed about it.

    Args:
        source: What the user asked for.
        extractor: The model's feature extractor, or None.
        config: The model's configuration.

    Raises:
        InputError: They contradict, or the model's own is none.
    """
    own = getattr(extractor, "sampling_rate", None) or setting(config, "sampling_rate")
    if own and (not isinstance(own, int) or not RATES[0] <= own <= RATES[1]):
        raise InputError("model.path", f"it takes {str(own)[:100]!r} samples a second", "repair its sampling_rate")
    if own and source.sampling_rate and own != source.sampling_rate:
        raise InputError(
            "data.sampling_rate",
            f"{source.sampling_rate} contradicts the model's {own} Hz",
            f"leave it out or set {own}",
        )
    given = own or source.sampling_rate
    if given is not None:
        return int(given), ()
    return _DEFAULT_RATE, (f"audio resampled to {_DEFAULT_RATE} Hz: neither the model nor the configuration says",)


def _resampled(rates: list[int], rate: int) -> tuple[str, ...]:
    """One line where clips have another rate than the model takes."""
    others = sorted({own for own in rates if own != rate})
    if not others:
        return ()
    told = listed([str(own) for own in others], 3)
    return (f"{sum(own != rate for own in rates)} of {counted(len(rates), 'clip')} resampled from {told} to {rate} Hz",)


@dataclass(frozen=True)
class Sound:
    """What a file of sound says of itself.

    Attributes:
        rate: [Hz]
        frames: Samples of each channel.
    """

    rate: int
    frames: int

    def samples(self, seconds: float, rate: int) -> int:
        """Length of the clip as it is read, cut to ``seconds`` [samples at ``rate``]."""
        return -(-min(self.frames, max(int(seconds * self.rate), 1)) * rate // self.rate)


def sound_of(file: Content) -> Sound:
    """Rate and length of a file of sound.

    Raises:
        InputError: It is none, or is empty.
    """
    with _opened(file) as stream:
        found = Sound(rate=int(stream.samplerate), frames=int(stream.frames))
    if found.frames <= 0:
        raise InputError("data.path", f"{file} holds no sound", "remove it")
    return found


@contextmanager
def _opened(file: Content) -> Iterator[soundfile.SoundFile]:
    """A file of sound, of a format that is taken and a rate that sound has."""
    check_file(file, MOST_STREAM_BYTES)
    with refusing("data.path", f"{file} is not readable audio", "repair or remove it"):
        with file.open("rb") as head:
            audio_format(file, head)
        with soundfile.SoundFile(str(file) if isinstance(file, Path) else file.open()) as stream:
            if stream.format not in AUDIO_FORMATS:
                raise InputError("data.path", f"{file} is of format {stream.format}", "convert it to wav or flac")
            if not RATES[0] <= stream.samplerate <= RATES[1]:
                problem = f"{file} has {stream.samplerate} samples a second, not {RATES[0]} to {RATES[1]}"
                raise InputError("data.path", problem, "repair or remove it")
            yield stream


def _is_fixed(extractor: Any, rate: int) -> bool:
    """Whether the extractor makes features of one length of clips of any length."""
    if extractor is None:
        return False
    with _extracting():
        shapes = {
            tuple(
                tuple(value.shape) for value in extractor([silence], sampling_rate=rate, return_tensors="pt").values()
            )
            for silence in (np.zeros(rate, np.float32), np.zeros(2 * rate, np.float32))
        }
    return len(shapes) == 1


def _extracting() -> AbstractContextManager[None]:
    return refusing("model.path", "its feature extractor fails", "repair or remove preprocessor_config.json")


def read_wave(file: Content, rate: int, seconds: float, length: int) -> npt.NDArray[np.float32]:
    """The beginning of a file of sound, mixed down to one channel.

    Args:
        file: An audio file, or its content.
        rate: What it is resampled to [Hz].
        seconds: Longest piece that is read [s].
        length: Samples at ``rate`` that are kept.

    Returns:
        (length,) in [-1, 1].

    Raises:
        InputError: It is damaged, has too many channels, or holds a sample that is not finite.
    """
    with _opened(file) as stream:
        own = int(stream.samplerate)
        frames = max(int(seconds * own), 1)
        if min(frames, stream.frames) * stream.channels > MOST_SAMPLES:
            raise InputError("data.path", f"{file} has {stream.channels} channels, too many", "mix it down")
        wave = stream.read(frames, dtype="float32", always_2d=True).mean(axis=1)
    if not np.isfinite(wave).all():
        raise InputError("data.path", f"{file} holds NaN or infinity", "repair or remove it")
    if own != rate:
        common = math.gcd(own, rate)
        wave = resample_poly(wave, rate // common, own // common)
    if len(wave) < length:
        raise InputError("data.path", f"{file} ends before its header says", "repair or remove it")
    return np.ascontiguousarray(wave[:length], dtype=np.float32)

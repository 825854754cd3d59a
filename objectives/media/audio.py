"""Audio files, by the model's own feature extractor where it has one."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from scipy.signal import resample_poly

from alphasmith.objectives.batch import Batch
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batches import MediaBatches
from alphasmith.objectives.media.source import MediaSource, is_transformers_config, setting

_DEFAULT_RATE = 16000


def load_audio(
    source: MediaSource, files: list[Path], *, model_folder: Path | None, model_config: Any, seed: int
) -> MediaBatches:
    """Audio as batches of features, or of mono waveforms (B, samples) in [-1, 1].

    Nothing is padded here: clips are batched by length and cut to the shortest of their batch, which keeps at least
    half of each, so that no silence of ours enters the statistics.

    Args:
        source: What to read.
        files: Audio files; ``source.samples`` of them are drawn from ``seed``.
        model_folder: Folder with a feature extractor; without one the waveform is passed on as it is.
        model_config: The model's configuration.
        seed: Draws the samples and the order of batches.

    Raises:
        InputError: A file is no readable audio, is empty, holds a non-finite sample, or the rates contradict.
    """
    extractor = _load_extractor(model_folder)
    rate, notes = _rate(source, extractor, model_config)
    generator = np.random.default_rng(seed)
    chosen = [files[i] for i in generator.permutation(len(files))[: source.samples]]
    lengths = {file: min(_duration(file), source.seconds) for file in chosen}
    groups: list[list[Path]] = []
    for file in sorted(chosen, key=lambda f: (lengths[f], f)):
        if groups and len(groups[-1]) < source.batch_size and lengths[groups[-1][0]] >= 0.5 * lengths[file]:
            groups[-1].append(file)
        else:
            groups.append([file])
    groups = [groups[i] for i in generator.permutation(len(groups))]

    def load(number: int) -> Batch:
        waves = [_read(file, rate, source.seconds) for file in groups[number]]
        shortest = min(map(len, waves))
        return _batch([wave[:shortest] for wave in waves], rate, extractor, model_config)

    if setting(model_config, "is_encoder_decoder", False):
        notes = (*notes, "the decoder sees its start token only; pass in-memory batches to calibrate it on more")
    return MediaBatches(sizes=tuple(map(len, groups)), load=load, notes=notes)


def _batch(waves: list[npt.NDArray[np.float32]], rate: int, extractor: Any, config: Any) -> Batch:
    if extractor is None:
        wave = torch.from_numpy(np.stack(waves))
        if not is_transformers_config(config):
            return Batch(args=(wave,))
        kwargs = {"input_values": wave}
    else:
        out = extractor(waves, sampling_rate=rate, return_tensors="pt")
        kwargs = {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}
    start = setting(config, "decoder_start_token_id")
    if setting(config, "is_encoder_decoder", False) and start is not None:
        kwargs["decoder_input_ids"] = torch.full((len(waves), 1), start)
    return Batch(kwargs=kwargs)


def _load_extractor(folder: Path | None) -> Any:
    names = ("preprocessor_config.json", "processor_config.json")
    if folder is None or not any((folder / name).is_file() for name in names):
        return None
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise InputError(
            "model.path", f"the feature extractor in {folder} cannot be loaded ({error})", "repair or remove it"
        ) from error


def _rate(source: MediaSource, extractor: Any, config: Any) -> tuple[int, tuple[str, ...]]:
    own = getattr(extractor, "sampling_rate", None) or setting(config, "sampling_rate")
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


def _duration(file: Path) -> float:
    try:
        info = soundfile.info(str(file))
    except (OSError, soundfile.SoundFileError) as error:
        raise InputError("data.path", f"{file} is not readable audio ({error})", "repair or remove it") from error
    if info.frames <= 0:
        raise InputError("data.path", f"{file} holds no sound", "remove it")
    return float(info.frames) / float(info.samplerate)


def _read(file: Path, rate: int, seconds: float) -> npt.NDArray[np.float32]:
    try:
        with soundfile.SoundFile(str(file)) as stream:
            own = int(stream.samplerate)
            wave = stream.read(max(int(seconds * own), 1), dtype="float32", always_2d=True).mean(axis=1)
    except (OSError, soundfile.SoundFileError) as error:
        raise InputError("data.path", f"{file} is not readable audio ({error})", "repair or remove it") from error
    if not np.isfinite(wave).all():
        raise InputError("data.path", f"{file} holds NaN or infinity", "repair or remove it")
    if own != rate:
        common = gcd(own, rate)
        wave = resample_poly(wave, rate // common, own // common)
    return np.ascontiguousarray(wave, dtype=np.float32)

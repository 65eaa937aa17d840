"""What audio models hear: a clip decoded, brought to the model's sampling rate, and turned into its features.

Decision: a table of five computations by name (`KINDS`), each with the numbers of `AudioFeatures`; a model says by its
configuration which one it was trained with. Features are made once per row, not once per pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Row
from layerwise.errors import DataError, missing_dependency
from layerwise.readers.audio import decoded
from layerwise.rows import Record

RATES = (1, 1_000_000)  # Hz; ultrasound recorders end at half a million


@dataclass(frozen=True)
class AudioFeatures:
    """`kind` names the computation (see `KINDS`), `rate` is the model's sampling rate in Hz.

    `scaled`: each clip is brought to mean 0 and variance 1. `mels` bands from windows of `window` samples every `hop`; `top` is
    the highest frequency in Hz (0: half the rate). `frames`: how many the model takes (0: as many as the clip gives). `mean`
    and `std` scale Kaldi's features. `least` and `most` are samples: shorter clips get silence, longer ones are cut. `copies`
    of the features lie in a dimension of their own, before the others (0: there is none).
    """

    rate: int = 16_000
    kind: str = "waveform"
    scaled: bool = True
    mels: int = 80
    window: int = 400
    hop: int = 160
    top: int = 0
    frames: int = 0
    mean: float = 0.0
    std: float = 1.0
    least: int = 1
    most: int = 480_000
    copies: int = 0

    def __call__(self, wave: Tensor) -> Tensor:
        """The features of one clip (samples,) at the model's rate, without what lies beyond `most`: float32."""
        wave = wave[: self.most]
        if len(wave) < self.least:
            wave = F.pad(wave, (0, self.least - len(wave)))
        found = KINDS[self.kind](self, wave)
        return found.expand(self.copies, *found.shape) if self.copies else found


def _waveform(features: AudioFeatures, wave: Tensor) -> Tensor:
    """(time,)"""
    return (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt() if features.scaled else wave


def _log_mel(features: AudioFeatures, wave: Tensor) -> Tensor:
    """(mels, frames): natural logarithm of the power on the mel scale 2595·log10(1 + f/700)."""
    if features.frames:
        wave = _of_length(wave, features.hop * (features.frames - 1))
    mel = (_spectrogram(features.rate, features.window, features.hop, features.mels, features.top, False)(wave) + 1e-6).log()
    return (mel - mel.mean()) / mel.std().clamp_min(1e-6) if features.scaled else mel


def _whisper(features: AudioFeatures, wave: Tensor) -> Tensor:
    """(mels, frames) of Radford et al. (2023): log10, no more than 8 below the loudest, (x + 4)/4."""
    wave = _of_length(wave, features.hop * features.frames)
    power = _spectrogram(features.rate, features.window, features.hop, features.mels, features.top, True)(wave)[:, :-1]
    log = power.clamp_min(1e-10).log10()
    return (log.maximum(log.max() - 8) + 4) / 4


def _kaldi(features: AudioFeatures, wave: Tensor) -> Tensor:
    """(frames, mels): Kaldi's filter bank, as the audio spectrogram transformer takes it (Gong et al. 2021)."""
    bank = _torchaudio().compliance.kaldi.fbank(
        wave[None], sample_frequency=features.rate, window_type="hanning", num_mel_bins=features.mels
    )
    bank = F.pad(bank, (0, 0, 0, max(features.frames - len(bank), 0)))[: features.frames or None]
    return (bank - features.mean) / (features.std * 2)


def _clap(features: AudioFeatures, wave: Tensor) -> Tensor:
    """(frames, mels) in decibels; a short clip is repeated as often as it fits, the rest is silence (Wu et al. 2023)."""
    length = features.hop * (features.frames - 1)
    wave = _of_length(wave.repeat(max(length // len(wave), 1)), length)
    slaney = features.copies <= 1  # models that fuse four views were trained with the other filters
    power = _spectrogram(features.rate, features.window, features.hop, features.mels, features.top, slaney)(wave)
    return 10 * power.clamp_min(1e-10).log10().T


KINDS: dict[str, Callable[[AudioFeatures, Tensor], Tensor]] = {
    "waveform": _waveform,
    "log_mel": _log_mel,
    "whisper": _whisper,
    "kaldi": _kaldi,
    "clap": _clap,
}


def clip_of(row: Row, place: str, rate: int) -> tuple[Tensor, int | None]:
    """The row's clip at `rate` Hz, (samples,) float32, and the rate that it came with (None where the row does not say).

    Raises `DataError` LW-D29 for a clip without a sample, LW-D32 for what is no clip, LW-D33 for NaN, and what decoding raises.
    """
    if row.get("audio") is None:
        columns = f"Its columns: {', '.join(map(str, row))}."
        remedy = f"Name the audio column (columns={{'audio': …}}). {columns}"
        raise DataError("The row has no audio.", place=place, remedy=remedy, code="LW-D32")
    found = decoded(Record(row, place), None)
    wave = _one_channel(found["audio"], place)
    given = found.get("sample_rate")
    return (wave, None) if given is None else (_resampled(wave, _rate(given, place), rate), int(given))


def _one_channel(samples: np.ndarray, place: str) -> Tensor:
    wave = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    if wave.dim() == 2:  # (channels, time) or (time, channels)
        wave = wave.mean(0 if wave.shape[0] <= wave.shape[1] else 1)
    if wave.dim() != 1:
        what = f"The clip is an array of shape {tuple(wave.shape)}."
        raise DataError(what, place=place, remedy="Give (samples,), or (channels, samples).", code="LW-D32")
    if not len(wave):
        raise DataError("The clip has no sample (0 seconds).", place=place, remedy="Leave the row out.", code="LW-D29")
    if not bool(wave.isfinite().all()):
        raise DataError("The clip holds NaN or infinity.", place=place, remedy="Mend or leave out the row.", code="LW-D33")
    return wave


def _rate(value: Any, place: str) -> int:
    known = isinstance(value, int | float | np.number) and math.isfinite(value)
    if not known or not RATES[0] <= value <= RATES[1] or int(value) != value:
        what = f"The sampling rate is {value!r}; it is a whole number of Hz from {RATES[0]} to {RATES[1]:,}."
        raise DataError(what, place=place, remedy="Mend the column 'sample_rate', or leave it out.", code="LW-D32")
    return int(value)


def _resampled(wave: Tensor, given: int, wanted: int) -> Tensor:
    return wave if given == wanted else _torchaudio().functional.resample(wave, given, wanted)


def _of_length(wave: Tensor, length: int) -> Tensor:
    return F.pad(wave[:length], (0, max(length - len(wave), 0)))


@lru_cache(maxsize=16)
def _spectrogram(rate: int, window: int, hop: int, mels: int, top: int, slaney: bool) -> Callable[[Tensor], Tensor]:
    scale: dict[str, Any] = {"norm": "slaney", "mel_scale": "slaney"} if slaney else {}
    return _torchaudio().transforms.MelSpectrogram(
        rate, n_fft=window, hop_length=hop, n_mels=mels, f_max=float(top) if top else None, **scale
    )


def _torchaudio() -> Any:
    try:
        import torchaudio
        import torchaudio.compliance.kaldi  # not loaded by the package itself
    except (ImportError, OSError) as error:  # OSError: built for another torch
        raise missing_dependency("torchaudio", "audio", "Resampling and audio features") from error
    return torchaudio

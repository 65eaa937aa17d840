"""Audio for Wav2Vec2, HuBERT, WavLM, Whisper, audio transformers, torchaudio, and any module with an ``audio_cfg``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.adapter import ADAPTERS, ModalityAdapter, library_of
from layerwise.adapters._audio import KINDS, AudioFeatures, clip_of
from layerwise.adapters._labels import labels_of
from layerwise.adapters._settings import json_file, processor
from layerwise.adapters._tokens import filler, shifted, start, tokenizer_in
from layerwise.data import Batch, Row
from layerwise.errors import DataError, UsageError, nearest
from layerwise.heads import EncoderWithHead, encoder_of
from layerwise.hugging import is_bare
from layerwise.rows import Record, place_of
from layerwise.task import Fidelity, LanguageModelling, Task

SETTINGS = "audio.json"
SECONDS = 0.5  # of the example's clips, where the model does not fix a length


@ADAPTERS.register("audio")
@dataclass(frozen=True)
class AudioModalityAdapter(ModalityAdapter):
    """Decodes, resamples to the model's rate, and makes the features that the model was trained on.

    Clips of unequal length are padded with silence; `mask` names the argument that says what is no padding ('' where the model
    has none), which holds ones and zeros, or the number of samples where it is called ``lengths``. `argument` names the
    forward's keyword ('' = the first). `start`: the id a decoder begins with, None where there is no decoder.
    """

    features: AudioFeatures = field(default_factory=AudioFeatures)
    argument: str = ""
    mask: str = ""
    start: int | None = None
    pad: int = 0
    tokenizer: Any = None
    modality: ClassVar[str] = "audio"
    priority: ClassVar[int] = 10

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        inner: Any = encoder_of(module)
        libraries = library_of(inner)
        if "transformers" in libraries:
            return _kind(inner) is not None
        return bool(_described(inner)) or ("torchaudio" in libraries and _takes(inner, "waveforms"))

    @classmethod
    def of(cls, module: nn.Module, folder: Path | None = None) -> AudioModalityAdapter:
        inner: Any = encoder_of(module)
        saved = json_file(folder / SETTINGS) if folder else {}
        adapter = _of_transformers(inner, folder) if "transformers" in library_of(inner) else _of_plain(inner)
        return replace(adapter, **{**saved, "features": AudioFeatures(**saved["features"])}) if saved else adapter

    def prepare(self, rows: Sequence[Row]) -> tuple[Sequence[Row], tuple[str, ...]]:
        """Rows with ``features``; notes say how many clips were resampled, cut, or shorter than the model can take.

        Raises `DataError` LW-D29, LW-D32 or LW-D33, or `DataShardError` for a clip that cannot be decoded, naming the row.
        """
        heard = [self._heard(row, place_of(row, i)) for i, row in enumerate(rows)]
        return [row for row, _, _ in heard], self._notes([h[1:] for h in heard if h[1]])

    def _heard(self, row: Row, place: str) -> tuple[Record, int, int | None]:
        """The row with its features, how many samples its clip has (0 if it was ready), and the rate it came with."""
        done = {key: row[key] for key in ("label", "features", "target_ids") if row.get(key) is not None}
        samples, given = 0, None
        if "features" not in done:
            wave, given = clip_of(row, place, self.features.rate)
            samples = len(wave)
            done["features"] = self.features(wave)
        if self.start is not None and "target_ids" not in done and row.get("target") is not None:
            done["target_ids"] = self._ids(row["target"], place)
        return Record(done, place), samples, given

    def _ids(self, text: Any, place: str) -> list[int]:
        if self.tokenizer is None or not isinstance(text, str):
            what = "has no tokenizer" if isinstance(text, str) else f"cannot read a target of type {type(text).__name__}"
            raise DataError(f"The model {what}.", place=place, remedy="Give 'target_ids', or load hf:DIR with its tokenizer.")
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def _notes(self, heard: Sequence[tuple[int, int | None]]) -> tuple[str, ...]:
        rate, most, least = self.features.rate, self._most(), self.features.least
        others = sorted({given for _, given in heard if given is not None and given != rate})
        counts = {
            f"clips were resampled from {', '.join(map(str, others))} to {rate} Hz": sum(g in others for _, g in heard),
            f"clips do not say their sampling rate: {rate} Hz, the model's, was assumed": sum(g is None for _, g in heard),
            f"clips were cut to the {most / rate:.4g} seconds that the model takes": sum(n > most for n, _ in heard),
            f"clips are shorter than {least} samples and were filled up with silence": sum(n < least for n, _ in heard),
        }
        notes = [f"{count} of {len(heard)} {what}" for what, count in counts.items() if count]
        if not self.features.frames and not self.mask and len({n for n, _ in heard}) > 1:
            notes.append("clips of unequal length are padded with silence that the model cannot tell from sound: it has no mask")
        return tuple(notes)

    def _most(self) -> int:
        """The samples of a clip that are heard."""
        frames = self.features.frames
        return min(self.features.most, frames * self.features.hop) if frames else self.features.most

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Features (samples, …, time), the mask or lengths, a decoder's tokens where there is one; labels (samples,)."""
        ready, _ = self.prepare(rows)
        sounds = [row["features"] for row in ready]
        lengths = [sound.shape[-1] for sound in sounds]
        stacked = torch.stack([nn.functional.pad(s, (0, max(lengths) - n)) for s, n in zip(sounds, lengths, strict=True)])
        kwargs: dict[str, Any] = {self.argument: stacked} if self.argument else {}
        if self.mask == "lengths":
            kwargs[self.mask] = torch.tensor(lengths)
        elif self.mask:
            kwargs[self.mask] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        if self.features.copies > 1:  # four views of one clip: whether they differ, which they do for cut ones only
            kwargs["is_longer"] = torch.zeros(len(ready), 1, dtype=torch.bool)
        labels = labels_of(ready)
        if self.start is not None:  # without a target a decoder is asked for its first token
            ids, mask, wanted = shifted([row.get("target_ids", ()) for row in ready], self.start, self.pad)
            kwargs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
            labels = wanted if labels is None and all("target_ids" in row for row in ready) else labels
        return Batch(() if self.argument else (stacked,), kwargs, labels)

    def example(self, module: nn.Module) -> Batch:
        """Two clips of noise, the same each time."""
        samples = max(int(SECONDS * self.features.rate), self.features.least)
        noise = torch.randn(2, samples, generator=torch.Generator().manual_seed(0)) / 10
        return self.collate([{"audio": clip, "sample_rate": self.features.rate} for clip in noise])

    def default_task(self, module: nn.Module, batch: Batch, output: Tensor) -> Task:
        """Language modelling of a decoder's targets; for hidden states never classification."""
        if self.start is not None and isinstance(batch.labels, Tensor) and batch.labels.dim() == 2:
            return LanguageModelling()
        return self.fidelity(module) if _embeds(module) else super().default_task(module, batch, output)

    def fidelity(self, module: nn.Module) -> Fidelity:
        return Fidelity(kind="cosine") if _embeds(module) else Fidelity()

    def save(self, folder: Path) -> None:
        settings = {"features": asdict(self.features), "argument": self.argument, "mask": self.mask}
        (folder / SETTINGS).write_text(json.dumps({**settings, "start": self.start, "pad": self.pad}, indent=1) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def kind_of(config: Any, main: str) -> str | None:
    """Which features a transformers model takes as `main`, by what its configuration speaks of; None where that is not told."""
    if main == "input_values":
        return "kaldi" if hasattr(config, "num_mel_bins") and hasattr(config, "max_length") else "waveform"
    if main == "input_features":
        if hasattr(config, "spec_size"):
            return "clap"
        return "whisper" if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions") else None
    return None


def features_of(config: Any, main: str, folder: Path | None) -> AudioFeatures:
    """The features that `kind_of` names, with the numbers of the configuration and of the folder's processor."""
    described: Any = DESCRIBED[str(kind_of(config, main))]
    found: AudioFeatures = described(config, processor(folder, "feature_extractor"))
    return found


def _kind(module: Any) -> str | None:
    """Codecs take waveforms too, but give codes: not claimed."""
    return None if _takes(module, "audio_codes") else kind_of(module.config, getattr(module, "main_input_name", ""))


def _of_transformers(module: Any, folder: Path | None) -> AudioModalityAdapter:
    kind, config, saved = _kind(module), module.config, processor(folder, "feature_extractor")
    masked = bool(saved.get("return_attention_mask", getattr(config, "feat_extract_norm", "layer") != "group"))
    mask = "attention_mask" if kind == "waveform" and masked and _takes(module, "attention_mask") else ""
    decodes = _takes(module, "decoder_input_ids")
    tokenizer = tokenizer_in(folder) if decodes and folder else None
    main = module.main_input_name
    adapter = AudioModalityAdapter(features_of(config, main, folder), main, mask, tokenizer=tokenizer)
    vocabulary = int(getattr(config, "vocab_size", None) or 1)
    begin, pad = start(config, vocabulary), filler(config, tokenizer, vocabulary)
    return replace(adapter, start=begin, pad=pad) if decodes else adapter


def _speech(config: Any, saved: Mapping[str, Any]) -> AudioFeatures:
    """Waveforms. The shortest clip is the one that all convolutions together turn into a single frame."""
    least = 1
    for kernel, stride in reversed(
        list(zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True))
    ):
        least = (least - 1) * stride + kernel
    scaled = bool(saved.get("do_normalize", True))
    return AudioFeatures(rate=int(saved.get("sampling_rate", 16_000)), scaled=scaled, least=least)


def _listened(config: Any, saved: Mapping[str, Any]) -> AudioFeatures:
    return AudioFeatures(
        kind="whisper", rate=int(saved.get("sampling_rate", 16_000)), mels=config.num_mel_bins,
        window=int(saved.get("n_fft", 400)), hop=int(saved.get("hop_length", 160)), frames=2 * config.max_source_positions,
    )  # fmt: skip


def _filtered(config: Any, saved: Mapping[str, Any]) -> AudioFeatures:
    mean, std = float(saved.get("mean", -4.2677393)), float(saved.get("std", 4.5689974))
    return AudioFeatures(
        kind="kaldi", rate=int(saved.get("sampling_rate", 16_000)), mels=config.num_mel_bins,
        frames=config.max_length, mean=mean, std=std, least=400,
    )  # fmt: skip


def _paired(config: Any, saved: Mapping[str, Any]) -> AudioFeatures:
    rate, hop = int(saved.get("sampling_rate", 48_000)), int(saved.get("hop_length", 480))
    wide = config.spec_size * (config.spec_size // config.num_mel_bins)  # frames that the windows of the model can hold
    frames = min(int(saved.get("max_length_s", 10)) * rate // hop + 1, wide)
    return AudioFeatures(
        kind="clap", rate=rate, mels=config.num_mel_bins, window=int(saved.get("fft_window_size", 1024)), hop=hop,
        top=int(saved.get("frequency_max", 14_000)), frames=frames, most=(frames - 1) * hop,
        copies=4 if getattr(config, "enable_fusion", False) else 1,
    )  # fmt: skip


DESCRIBED = {"waveform": _speech, "whisper": _listened, "kaldi": _filtered, "clap": _paired}


def _described(module: nn.Module) -> Mapping[str, Any]:
    """The module's own word on what it hears: ``audio_cfg = {"rate": 8000, "kind": "log_mel", "mels": 40, …}``."""
    found = getattr(module, "audio_cfg", None)
    return found if isinstance(found, Mapping) and "rate" in found else {}


def features_from(cfg: Mapping[str, Any]) -> AudioFeatures:
    """Of a module's own description. Raises `UsageError` for a setting that does not exist."""
    known = {f.name for f in fields(AudioFeatures)}
    wrong = next((key for key in cfg if key not in known), None)
    if wrong is not None:
        raise UsageError(f"audio_cfg has the unknown setting {wrong!r}.", remedy=nearest(wrong, known))
    if cfg.get("kind", "waveform") not in KINDS:
        raise UsageError(f"audio_cfg asks for the features {cfg['kind']!r}.", remedy=nearest(str(cfg["kind"]), KINDS))
    return AudioFeatures(**{"scaled": False, **cfg})


def _of_plain(module: nn.Module) -> AudioModalityAdapter:
    """Of a module with an ``audio_cfg``, or of torchaudio."""
    features = features_from(_described(module))
    mask = next((name for name in ("lengths", "attention_mask") if _takes(module, name)), "")
    return AudioModalityAdapter(features, mask=mask if features.kind == "waveform" else "")


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(module).forward).parameters


def _embeds(module: nn.Module) -> bool:
    """Whether it gives hidden states or embeddings and no logits."""
    inner = encoder_of(module)
    if isinstance(module, EncoderWithHead) or "transformers" not in library_of(inner):
        return False
    return is_bare(inner) or _kind(inner) == "clap"

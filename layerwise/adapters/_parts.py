"""What a model of several modalities is fed with: one adapter per modality, read from its configuration or its own words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.adapters import audio, vision
from layerwise.adapters._audio import AudioFeatures
from layerwise.adapters._image import Transform
from layerwise.adapters._settings import json_file, processor
from layerwise.adapters._tokens import Words, ends, filler, longest, start, tokenizer_in
from layerwise.adapters.audio import AudioModalityAdapter
from layerwise.adapters.text import TextModalityAdapter
from layerwise.adapters.vision import VisionModalityAdapter
from layerwise.errors import UsageError, nearest
from layerwise.trace import evaluating

MODALITIES = ("text", "image", "audio")
SOUNDS = ("input_features", "input_values")


@dataclass(frozen=True)
class Parts:
    """`adapters`: modality → its adapter. `flag`: the forward's argument that says what is there ('' = none). `blank`: the ids
    of an empty text. `placeholder`: the id that stands for an image in the text, and how many of it make one.
    """

    adapters: tuple[tuple[str, Any], ...]
    flag: str = ""
    blank: tuple[int, ...] = ()
    placeholder: tuple[int, int] | None = None


def described(module: nn.Module) -> Mapping[str, Any]:
    """The module's own word on what it reads, ``multimodal_cfg``; empty where it says nothing."""
    found = getattr(module, "multimodal_cfg", None)
    return found if isinstance(found, Mapping) else {}


def takes(module: nn.Module, name: str) -> bool:
    """Whether the forward has this argument."""
    return name in inspect.signature(type(module).forward).parameters


def sound_argument(module: nn.Module) -> str:
    """The forward's argument for audio, '' where there is none."""
    return next((name for name in SOUNDS if takes(module, name)), "")


def own_parts(module: nn.Module, cfg: Mapping[str, Any]) -> Parts:
    """Of a module that describes itself: its forward takes ``image``, ``audio``, ``input_ids`` and ``attention_mask``, as far as
    it reads them, and, where it can do without some, ``present`` (samples, modalities in the order of the description).

    Raises `UsageError` for an unknown modality or fewer than two.
    """
    wrong = next((name for name in cfg if name not in MODALITIES), None)
    if wrong is not None:
        raise UsageError(f"multimodal_cfg has the unknown modality {wrong!r}.", remedy=nearest(str(wrong), MODALITIES))
    if len(cfg) < 2:
        raise UsageError("multimodal_cfg describes fewer than two modalities.", remedy=f"Known: {', '.join(MODALITIES)}.")
    flag = "present" if takes(module, "present") else ""
    build = {"text": _own_text, "image": _own_image, "audio": _own_audio}
    return Parts(tuple((name, build[name](cfg[name])) for name in cfg), flag, () if flag else (1,))


def _own_text(cfg: Mapping[str, Any]) -> TextModalityAdapter:
    words = tuple(cfg.get("words", ()))
    return TextModalityAdapter(len(words) + 2, longest=cfg.get("length"), tokenizer=Words(words))


def _own_image(cfg: Mapping[str, Any]) -> VisionModalityAdapter:
    return VisionModalityAdapter(vision.from_cfg(cfg), "image")


def _own_audio(cfg: Mapping[str, Any]) -> AudioModalityAdapter:
    return AudioModalityAdapter(audio.features_from(cfg), "audio")


def transformers_parts(module: Any, folder: Path | None) -> Parts:
    """Of a transformers model that takes token ids and pixels or sounds."""
    text, image, sound = _text(module, folder), _image(module, folder), _audio(module, folder)
    placeholder = _placeholder(module, image)
    if placeholder is not None and text.longest is not None:
        text = replace(text, longest=max(text.longest - placeholder[1], 1))
    found = (("text", text), ("image", image), ("audio", sound))
    return Parts(tuple((n, a) for n, a in found if a is not None), "", _blank(module.config.get_text_config(), text), placeholder)


def _text(module: Any, folder: Path | None) -> TextModalityAdapter:
    config = module.config.get_text_config()
    tokenizer = tokenizer_in(folder or Path(module.config.name_or_path or "?"))
    vocabulary = int(config.vocab_size)
    decodes = takes(module, "decoder_input_ids") and bool(getattr(config, "is_encoder_decoder", False))
    return TextModalityAdapter(
        vocabulary=vocabulary,
        longest=longest(config, tokenizer),
        pad=filler(config, tokenizer, vocabulary),
        start=start(config, vocabulary) if decodes else None,
        tokenizer=tokenizer,
        fixed=(("use_cache", False),) if takes(module, "use_cache") else (),
    )


def _image(module: Any, folder: Path | None) -> VisionModalityAdapter | None:
    if not takes(module, "pixel_values"):
        return None
    config = getattr(module.config, "vision_config", module.config)
    side = getattr(config, "image_size", 224)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    saved = json_file(folder / vision.SETTINGS) if folder else {}
    if saved:
        return VisionModalityAdapter(vision.from_json(saved), "pixel_values")
    transform = vision.from_processor(processor(folder, "image_processor")) or Transform()
    size = (int(getattr(config, "num_channels", 3)), int(height), int(width))
    return VisionModalityAdapter(replace(transform, size=size), "pixel_values")


def _audio(module: Any, folder: Path | None) -> AudioModalityAdapter | None:
    main, config = sound_argument(module), getattr(module.config, "audio_config", None)
    if not main or config is None or audio.kind_of(config, main) is None:
        return None
    saved = json_file(folder / audio.SETTINGS) if folder else {}
    features = AudioFeatures(**saved["features"]) if saved else audio.features_of(config, main, folder)
    return AudioModalityAdapter(features, main)


def _blank(config: Any, text: TextModalityAdapter) -> tuple[int, ...]:
    """What the tokenizer makes of nothing; without one the ids that begin and end a text."""
    if text.tokenizer is not None:
        made = tuple(text.tokenizer("", verbose=False)["input_ids"])
        if made:
            return made
    begins = getattr(config, "bos_token_id", None)
    known = [*([begins] if begins is not None and 0 <= begins < text.vocabulary else []), *ends(config, text.vocabulary)[:1]]
    return tuple(known) or (text.pad,)


def _placeholder(module: Any, image: VisionModalityAdapter | None) -> tuple[int, int] | None:
    """The image token, and how many of them one image fills: by the configuration, else by one forward of the image's half."""
    token = getattr(module.config, "image_token_id", None)
    if token is None or image is None:
        return None
    queries = getattr(module.config, "num_query_tokens", None)
    if queries is None and not callable(getattr(module, "get_image_features", None)):
        return None  # a class of texts alone on a model of both
    if queries is None:
        with evaluating(module), torch.no_grad():
            blank = torch.zeros(1, *image.transform.size, dtype=module.dtype, device=module.device)
            try:
                queries = len(module.get_image_features(pixel_values=blank).pooler_output[0])
            except Exception:  # an image half that is not there, or does not run by itself: texts still can be read
                return None
    return int(token), int(queries)

"""transformers: every class of the auto-mappings that the page lists, from its default configuration, shrunk, and fed from its
forward's signature. No names of models."""

from __future__ import annotations

import itertools
import time
from functools import cache
from typing import Any

import torch

from layerwise.benchmark.architectures.made import Group, Made, NotBuilt, brief
from layerwise.benchmark.shrinking import steps
from layerwise.examples import candidates, failure
from layerwise.quiet import silence_import_noise

MAPPINGS = {
    "CAUSAL_LM": "causal language modelling",
    "MASKED_LM": "masked language modelling",
    "SEQUENCE_CLASSIFICATION": "sequence classification",
    "SEQ_TO_SEQ_CAUSAL_LM": "text to text",
    "IMAGE_CLASSIFICATION": "image classification",
    "AUDIO_CLASSIFICATION": "audio classification",
    "CTC": "speech recognition by CTC",
    "SPEECH_SEQ_2_SEQ": "speech to text",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "zero-shot image classification",
    "OBJECT_DETECTION": "object detection",
    "ZERO_SHOT_OBJECT_DETECTION": "zero-shot object detection",
    "SEMANTIC_SEGMENTATION": "semantic segmentation",
    "INSTANCE_SEGMENTATION": "instance segmentation",
    "UNIVERSAL_SEGMENTATION": "universal segmentation",
    "IMAGE_SEGMENTATION": "image segmentation",
    "MASK_GENERATION": "mask generation",
}
MOST = (40_000_000, 400_000_000)  # parameters: first what is small; some hold a part that no setting makes smaller
PATIENCE = 60.0  # seconds of trying to build one class


@cache
def mapped() -> dict[str, tuple[str, ...]]:
    """Class → the mappings that name it, classes in alphabetical order."""
    silence_import_noise()
    from transformers.models.auto import modeling_auto

    found: dict[str, list[str]] = {}
    for mapping in MAPPINGS:
        for named in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in [named] if isinstance(named, str) else named:
                found.setdefault(name, []).append(mapping)
    return {name: tuple(dict.fromkeys(found[name])) for name in sorted(found)}


def make(name: str) -> Made:
    """The first shrunk configuration that builds and runs. Raises `NotBuilt` with what the attempts said."""
    import transformers

    transformers.logging.set_verbosity_error()
    cls: Any = getattr(transformers, name)
    said: list[str] = []
    started = time.monotonic()
    for most, (number, config) in itertools.product(MOST, enumerate(steps(cls.config_class, said), 1)):
        if time.monotonic() - started > PATIENCE:
            said.append(f"given up after {PATIENCE:.0f} s")
            break
        made = _tried(cls, config, most, said)
        if made is not None:
            return Made(made.module, made.example, f"shrunk in step {number}; reads {', '.join(made.example.kwargs)}")
    reason = "; ".join(dict.fromkeys(said))
    broken = _default(cls)
    raise NotBuilt(f"the default configuration does not build either: {broken}" if broken else reason or "no step made one")


def _tried(cls: Any, config: Any, most: int, said: list[str]) -> Made | None:
    """The class with this configuration and the first batch on which it runs; else None, and the reasons in `said`."""
    config.use_cache = False
    try:
        size = _size(cls, config)
        if size > most or (most > MOST[0] and size <= MOST[0]):  # the latter were tried before
            said += [f"{size:,} parameters even when shrunk"] if size > MOST[-1] else []
            return None
        torch.manual_seed(0)
        module = cls(config).eval()
    except Exception as error:  # whatever a constructor raises on a configuration that does not suit it
        said.append(brief(error))
        return None
    _padded_(module.config)
    started = time.monotonic()
    for batch in candidates(module):
        if time.monotonic() - started > PATIENCE / 2:
            said.append(f"no batch that runs was found within {PATIENCE / 2:.0f} s")
            break
        reason = failure(module, batch)
        if reason is None:
            return Made(module, batch)
        said.append(f"given {', '.join(batch.kwargs)}: {reason[:200]}")
    return None


def _default(cls: Any) -> str:
    """Why the class cannot be built from its default configuration in full size; empty where it can."""
    try:
        with torch.device("meta"):
            cls(cls.config_class())
    except Exception as error:
        return brief(error)
    return ""


def _size(cls: Any, config: Any) -> int:
    """Parameters, counted without memory; 0 where that does not work, since some compute with tensors while they are built."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in cls(config).parameters())
    except (RuntimeError, NotImplementedError):
        return 0


def _padded_(config: Any) -> None:
    """Classifiers on decoders look for the last token that is no padding, so there must be such a token."""
    for part in (config, config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0


GROUP = Group("transformers", lambda: list(mapped()), make, lambda name: [MAPPINGS[m] for m in mapped()[name]])

"""What transformers' own tables say about a model's class. No names of models here; a subclass is what its base is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def modalities(module: nn.Module) -> tuple[str, ...]:
    """What a transformers model reads: ``("text",)``, ``("image",)``, ``("image", "text")``, …"""
    declared: Any = getattr(module, "input_modalities", ())
    return (declared,) if isinstance(declared, str) else tuple(declared)


def reads_text_only(module: nn.Module) -> bool:
    """Whether token ids are all that the forward needs."""
    return getattr(module, "main_input_name", "") == "input_ids" and modalities(module) == ("text",)


def hears_waveforms(module: nn.Module) -> bool:
    """Whether it reads sound as it is, and a mask over its samples; spectrograms and codecs do not."""
    takes = inspect.signature(type(module).forward).parameters
    return getattr(module, "main_input_name", "") == "input_values" and {"attention_mask", "mask_time_indices"} <= set(takes)


def is_bare(module: nn.Module) -> bool:
    """Whether the class gives hidden states and has no head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, MODEL_MAPPING_NAMES

    return type(module).__name__ in _classes(MODEL_MAPPING_NAMES) | _classes(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)


def is_causal(module: nn.Module) -> bool:
    """Whether the class predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return bool({cls.__name__ for cls in type(module).__mro__} & _classes(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def is_sequence_to_sequence(module: Any) -> bool:
    """Whether the forward wants tokens for its decoder; a classifier on an encoder–decoder makes them itself."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as GENERATORS

    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(module.config.is_encoder_decoder) and (is_bare(module) or bool(names & _classes(GENERATORS)))


def _classes(mapping: Mapping[str, Any]) -> set[str]:
    return {n for names in mapping.values() for n in ([names] if isinstance(names, str) else names)}

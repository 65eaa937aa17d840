"""The native architecture for transformers: ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM`` and
``AutoModelForSequenceClassification`` know ``vft`` once this module has been imported.

Not imported by `layerwise.native`: transformers is an extra. The classes hold a `VFTModel` as ``vft`` and add transformers'
outputs and losses; folders of either side are read by the other. Generation is the native one: its cache is not transformers'.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import missing_dependency
from layerwise.native.model import VFTModel
from layerwise.native.saving import MODEL_TYPE
from layerwise.native.settings import VFTSettings

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput
except ImportError as error:
    raise missing_dependency("transformers", "text", "Using a VFT through transformers") from error

NAMES = tuple(f.name for f in fields(VFTSettings))


class VFTConfig(PretrainedConfig):
    """`VFTSettings` as a configuration of transformers; every setting is an attribute of the same name."""

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_positions",
    }

    def __init__(self, **given: Any) -> None:
        defaults = {f.name: f.default for f in fields(VFTSettings)}
        for name in NAMES:
            value = given.pop(name, defaults[name])
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        if self.classes and "id2label" not in given:
            given.setdefault("num_labels", self.classes)
        super().__init__(**{"use_cache": False, "is_decoder": self.causal} | given)

    def settings(self) -> VFTSettings:
        """Raises `UsageError` for values that make no model."""
        return VFTSettings.of({name: getattr(self, name) for name in NAMES})


class VFTPreTrainedModel(PreTrainedModel):
    """What the classes below share; `vft` is the native model."""

    vft: VFTModel
    config_class = VFTConfig
    base_model_prefix = "vft"
    main_input_name = "input_ids"
    _no_split_modules = ["VFTBlock"]  # noqa: RUF012  # transformers declares it as an instance variable
    _supports_sdpa = True

    def _init_weights(self, module: Any) -> None:
        """Nothing: the native modules have drawn their weights, and a second draw would part U from Vᵀ."""

    def get_input_embeddings(self) -> Any:
        return self.vft.embedding.tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.vft.embedding.tokens = value


class VFTPreTrainedEncoder(VFTPreTrainedModel):
    """Hidden states."""

    def __init__(self, config: VFTConfig) -> None:
        super().__init__(config)
        self.vft = VFTModel(config.settings())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """`pixel_values` (B, C, H, W) and `input_features` (B, T, F) are the native model's images and frames."""
        x = self.vft.embedding(input_ids, pixel_values, input_features)
        return BaseModelOutput(last_hidden_state=self.vft.hidden(x, self.vft.full_mask(x, attention_mask)))


class VFTForCausalLM(VFTPreTrainedModel):
    """Next-token logits; the loss is that of the labels moved by one, −100 left out."""

    def __init__(self, config: VFTConfig) -> None:
        super().__init__(config)
        self.vft = VFTModel(config.settings(), causal=True, classes=0)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        logits = self.vft(input_ids, pixel_values, input_features, attention_mask)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
    ) -> Tensor:
        """See `layerwise.native.generation.generate`; greedy, or drawn with `do_sample`, up to the ``eos_token_id``."""
        end = getattr(self.config, "eos_token_id", None)
        how: dict[str, Any] = {"attention_mask": attention_mask, "top_k": top_k, "end": end}
        return self.vft.generate(input_ids, max_new_tokens, temperature=temperature if do_sample else 0.0, **how)


class VFTForSequenceClassification(VFTPreTrainedModel):
    """One of ``config.classes`` classes (or ``num_labels`` where that is 0) per sample."""

    def __init__(self, config: VFTConfig) -> None:
        super().__init__(config)
        self.vft = VFTModel(config.settings(), classes=config.classes or config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        logits = self.vft(input_ids, pixel_values, input_features, attention_mask)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def register() -> None:
    """Makes ``vft`` known to the Auto classes; done on import, and harmless a second time."""
    AutoConfig.register(MODEL_TYPE, VFTConfig, exist_ok=True)
    AutoModel.register(VFTConfig, VFTPreTrainedEncoder, exist_ok=True)
    AutoModelForCausalLM.register(VFTConfig, VFTForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(VFTConfig, VFTForSequenceClassification, exist_ok=True)


register()

__all__ = ["VFTConfig", "VFTForCausalLM", "VFTForSequenceClassification", "VFTPreTrainedEncoder", "register"]

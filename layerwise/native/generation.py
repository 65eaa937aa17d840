"""Text from a causal `VFTModel`, one token at a time, from a cache of r numbers per token and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.errors import UsageError

if TYPE_CHECKING:
    from layerwise.native.model import VFTModel


@torch.no_grad()
def generate(
    model: VFTModel,
    input_ids: Tensor,
    new_tokens: int = 32,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The prompts (B, T) with up to `new_tokens` more, (B, T + n); after `end` a row repeats it; all rows ending stop the run.

    `temperature` 0 takes the likeliest token; else tokens are drawn from the `top_k` likeliest (0: from all). Prompts of unlike
    lengths are padded on the left, with `attention_mask` 0 there. Leaves the train flags as they were. Raises `UsageError` for a
    model without next-token logits.
    """
    if not (model.settings.causal and model.settings.vocab_size) or model.settings.classes:
        raise UsageError(
            "This model does not predict a next token.", remedy="Build it with causal=True and vocab_size, no classes."
        )
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        return _generated(model, input_ids, new_tokens, attention_mask, end, _Chooser(temperature, top_k, generator))
    finally:
        for module, training in flags:
            module.training = training


class _Chooser:
    def __init__(self, temperature: float, top_k: int, generator: torch.Generator | None) -> None:
        self.temperature, self.top_k, self.generator = temperature, top_k, generator

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, vocabulary) → (B, 1)."""
        if self.temperature <= 0:
            return logits.argmax(-1, keepdim=True)
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        return torch.multinomial((logits.float() / self.temperature).softmax(-1), 1, generator=self.generator)


def _generated(model: VFTModel, ids: Tensor, count: int, mask: Tensor | None, end: int | None, choose: _Chooser) -> Tensor:
    cache, given = model.new_cache(), ids
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for step in range(count):
        logits = model(given, attention_mask=mask if step == 0 else None, cache=cache)[:, -1]
        given = choose(logits)
        if end is not None:
            given = given.masked_fill(ended, end)
            ended |= given == end
        ids = torch.cat((ids, given), 1)
        if end is not None and bool(ended.all()):
            break
    return ids


__all__ = ["generate"]

"""Weights in 16 bits: what is stored, what is computed with, and what is told apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.compress.half_embeddings import HalfEmbeddings
from layerwise.compress.half_weights import HalfWeights
from layerwise.data import Batch
from layerwise.errors import UsageError
from layerwise.lowbit.halves import HalfWeight
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import equivalence
from layerwise.tensors import byte_size
from tests.models import CASES


def test_it_computes_with_the_rounded_numbers_in_the_old_type() -> None:
    """Fails where activations are cast too, or a table's rows are not those that were asked for."""
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    half: torch.Tensor = HalfWeight(weight.half(), weight.dtype)
    assert torch.equal(F.linear(x, half), F.linear(x, weight.half().float()))
    ids = torch.tensor([[1, 1, 4]])
    assert torch.equal(F.embedding(ids, half), weight.half().float()[ids])
    with pytest.raises(UsageError, match="would write into a weight of 16 bits"):
        half.mul_(2)


def test_only_the_named_layers_and_only_matrices_are_halved() -> None:
    model = CASES["gpt2"].model()
    name = model.layers[1].name
    after = apply_plan(model, CompressionPlan((step_of(HalfWeights(), [name]),))).model
    halved = {n for n, p in after.module.named_parameters() if isinstance(p, HalfWeight)}
    assert halved == {n for n, p in model.module.named_parameters() if n.startswith(f"{name}.") and p.dim() == 2}
    assert byte_size(model.module) - byte_size(after.module) == 2 * sum(model.module.get_parameter(n).numel() for n in halved)


def test_tables_and_a_tied_head_are_halved_once() -> None:
    model = CASES["gpt2"].model()
    module = apply_plan(model, CompressionPlan((step_of(HalfEmbeddings("bfloat16"), []),))).model.module
    assert module.get_parameter("lm_head.weight") is module.get_parameter("transformer.wte.weight")
    assert isinstance(module.get_parameter("lm_head.weight"), HalfWeight)


def test_another_rounding_is_found() -> None:
    model = CASES["residual"].model()
    plan = CompressionPlan((step_of(HalfWeights(), ["blocks.0"]),))
    other = CompressionPlan((step_of(HalfWeights("bfloat16"), ["blocks.0"]),))
    batches = [CASES["residual"].batch(2)]
    good, bad = apply_plan(model, plan).model, apply_plan(model, other).model
    assert next(equivalence(model, good, plan, batches)).passed
    assert not next(equivalence(model, bad, plan, batches)).passed


def test_numbers_beyond_the_range_are_refused() -> None:
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with torch.no_grad():
        module.get_parameter("1.weight")[0, 0] = 1e6
    model = UniversalModel(module, example=Batch((torch.randn(2, 4),)))
    assert [HalfWeights().treats(x) for x in model.layers] == ["", "weight has numbers beyond the range of float16", ""]
    assert not any(HalfWeights("bfloat16").treats(x) for x in model.layers)
    with pytest.raises(UsageError, match="Did you mean 'float16'"):
        HalfWeights("floot16")

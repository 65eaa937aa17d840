"""Tables in a few bits: looked up by row they give what the whole unpacked table gives, tied heads stay tied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.compress.packed_embeddings import PackedEmbeddings
from layerwise.lowbit.grid import Grid
from layerwise.lowbit.packed import PackedWeight
from layerwise.method import apply_plan, step_of
from layerwise.plan import CompressionPlan
from layerwise.tensors import byte_size, dense
from tests.models import CASES


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rows_are_those_of_the_unpacked_table(bits: int) -> None:
    """Fails where scales, zeros or codes of another row are taken."""
    torch.manual_seed(0)
    packed = PackedWeight.rounded(torch.randn(50, 20) * torch.rand(50, 1), Grid(bits, 8))
    ids = torch.randint(0, 50, (3, 7))
    assert torch.equal(F.embedding(ids, packed), F.embedding(ids, dense(packed)))


def test_tables_shrink_wherever_they_stand_and_tied_ones_stay_tied() -> None:
    model = CASES["gpt2"].model()
    result = apply_plan(model, CompressionPlan((step_of(PackedEmbeddings(4), []),))).model
    module = result.module
    assert module.lm_head.weight is module.transformer.wte.weight
    assert isinstance(module.lm_head.weight, PackedWeight)
    assert byte_size(module) < byte_size(model.module)
    assert torch.equal(result.predict(CASES["gpt2"].batch(2)), result.predict(CASES["gpt2"].batch(2)))


def test_where_there_is_no_table_nothing_changes() -> None:
    model = CASES["residual"].model()
    assert not any(isinstance(m, nn.Embedding) for m in model.module.modules())
    result = apply_plan(model, CompressionPlan((step_of(PackedEmbeddings(), []),))).model
    assert result.fingerprint == model.fingerprint

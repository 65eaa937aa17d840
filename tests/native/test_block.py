"""A whole block: shapes, counts by formula, causality, and an eval forward that leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from layerwise.data import Batch
from layerwise.native import BlockOptions, VeinProjector, VFTBlock, VFTModel, VFTSettings
from layerwise.native.block import VeinStatistics
from layerwise.native.costs import block_macs, block_parameters, dense_block_macs, dense_block_parameters
from layerwise.trace import traced


def block(**options: Any) -> VFTBlock:
    torch.manual_seed(0)
    made = VFTBlock(24, 4, 6, BlockOptions(**options))
    if made.compensator.s:
        torch.nn.init.normal_(made.compensator.u, std=0.5)
    return made.eval()


def x(length: int = 9) -> torch.Tensor:
    return torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1))


def test_it_works_as_written() -> None:
    made, given = VFTBlock(d_model=768, n_heads=12, rank=64), torch.randn(1, 3, 768)
    assert made(given).shape == given.shape


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"orthogonal": True}, {"normals": 0}, {"hidden": 20, "normals": 3}])
def test_the_parameters_are_those_of_the_formula(options: dict[str, Any]) -> None:
    s = VFTSettings(d_model=24, n_heads=4, rank=6, vocab_size=5, **options)
    assert sum(p.numel() for p in VFTBlock(24, 4, 6, s.block()).parameters()) == block_parameters(s)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"normals": 0}, {"hidden": 20, "normals": 3}, {"kv_heads": 2}])
@pytest.mark.parametrize("threshold", [-1.0, 2.0])
def test_the_multiply_accumulates_are_those_of_the_formula(options: dict[str, Any], threshold: float) -> None:
    s = VFTSettings(d_model=24, n_heads=4, rank=6, vocab_size=5, threshold=threshold, **options)
    macs = traced(VFTBlock(24, 4, 6, s.block()).eval(), Batch((torch.randn(1, 9, 24),))).macs
    assert macs == block_macs(s, 9, 9 if threshold < 0 else 0)


def test_the_dense_formulas_are_those_of_a_dense_block() -> None:
    d, T = 24, 9
    made = torch.nn.TransformerEncoderLayer(d, 4, 4 * d, batch_first=True, norm_first=True)
    assert sum(p.numel() for p in made.parameters()) == dense_block_parameters(d)
    assert dense_block_macs(d, T) == T * 12 * d * d + 2 * T * T * d


def test_no_token_sees_a_later_one() -> None:
    made, given = block(), x()
    changed = given.clone()
    changed[:, 5:] += 1
    before, after = made(given, is_causal=True), made(changed, is_causal=True)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_all_parts_take_part() -> None:
    made, given = block(), x()
    whole = made(given)
    for part in (made.attention, made.feed_forward, made.compensator):
        part.forward = lambda h, **_: torch.zeros_like(h)
        assert not torch.allclose(made(given), whole)
        del part.forward
    assert torch.equal(made(given), whole)


def test_an_eval_forward_leaves_no_trace() -> None:
    made, given = block(), x()
    weights, state = copy.deepcopy(made.state_dict()), torch.get_rng_state()
    before = {name: dict(vars(m)) for name, m in made.named_modules()}
    found: list[VeinStatistics] = []
    first = made(given, statistics=found)
    assert torch.equal(made(given), first)
    assert {name: dict(vars(m)) for name, m in made.named_modules()} == before
    assert all(torch.equal(weights[k], v) for k, v in made.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_with_a_cache_the_normals_are_made_once_and_give_the_same() -> None:
    made, given = block(), x()
    calls: list[int] = []
    plain = made.compensator.directions
    made.compensator.directions = lambda vein: calls.append(1) or plain(vein)
    full = made(given, is_causal=True)
    assert len(calls) == 1
    cache = made.new_cache()
    parts = [made(given[:, i : i + 1], is_causal=True, cache=cache) for i in range(9)]
    assert len(calls) == 2
    torch.testing.assert_close(torch.cat(parts, 1), full)


def test_the_statistics_are_those_of_the_tensor_that_is_corrected() -> None:
    made, given = block(), x()
    found: list[VeinStatistics] = []
    made(given, statistics=found)
    middle = given + made.attention(made.norm1(given), projector=made.projector)
    rate = made.projector.off_plane(made.norm2(middle))[0]
    (one,) = found
    torch.testing.assert_close(one.mean, rate.mean())
    torch.testing.assert_close(one.largest, rate.max())
    torch.testing.assert_close(one.share, (rate > made.compensator.tau).float().mean())
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[:, 4:] = False
    made(given, statistics=found, key_padding=padding)
    attended = given + made.attention(made.norm1(given), projector=made.projector, key_padding=padding)
    torch.testing.assert_close(found[1].mean, made.projector.off_plane(made.norm2(attended))[0][:, :4].mean())


def test_blocks_may_share_one_projector() -> None:
    vein = VeinProjector(24, 6)
    one, two = (VFTBlock(24, 4, 6, projector=vein) for _ in range(2))
    two(one(x())).sum().backward()
    assert vein.V.grad is not None
    assert len({id(p) for b in (one, two) for p in b.parameters()}) == sum(1 for _ in one.parameters()) * 2 - 2


def test_every_parameter_learns() -> None:
    made = block(stabilizer="lowrank", threshold=0.9).train()
    torch.nn.init.normal_(made.feed_forward.stabilizer[1].weight)
    made(x()).square().sum().backward()
    assert [n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_bfloat16_is_stable() -> None:
    made, given = block(), x()
    exact = made(given)
    made.bfloat16()
    for scale in (1.0, 1e4):
        assert bool(made(given.bfloat16() * scale, is_causal=True).isfinite().all())
    assert float((made(given.bfloat16()).float() - exact).norm() / exact.norm()) < 0.05
    made.train()(given.bfloat16()).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in made.parameters())


def test_dropout_acts_while_training_only() -> None:
    made, given = block(dropout=0.5), x()
    assert torch.equal(made(given), made(given))
    made.train()
    assert not torch.equal(made(given), made(given))


def test_a_models_penalty_grows_when_the_veins_part() -> None:
    model = VFTModel(d_model=16, n_layers=2, n_heads=2, rank=4, vocab_size=5)
    assert float(model.penalty(1.0)) < 1e-9
    torch.nn.init.normal_(model.blocks[1].projector.U)
    assert float(model.penalty(1.0)) > 0.1

"""The feed-forward in the vein: its formula, and side paths that are there only when asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from layerwise.errors import UsageError
from layerwise.native import VFTFeedForward

ACTS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@pytest.mark.parametrize("act", ACTS)
def test_it_is_its_formula(act: str) -> None:
    torch.manual_seed(0)
    f, x = VFTFeedForward(24, 6, act=act).double(), torch.randn(2, 5, 24, dtype=torch.float64)
    V, U = f.projector.V, f.projector.U
    hidden = ACTS[act](x @ V.T @ f.up.weight.T + f.up.bias)
    assert hidden.shape[-1] == 12  # 2r
    torch.testing.assert_close(f(x), (hidden @ f.down.weight.T + f.down.bias) @ U.T)
    torch.testing.assert_close(f(x, z=f.projector(x)), f(x))


@pytest.mark.parametrize(("kind", "size"), [("diag", 24), ("lowrank", 2 * 24 * 6), ("dense", 24 * 24)])
def test_a_stabilizer_costs_what_it_says_and_starts_as_nothing(kind: str, size: int) -> None:
    plain, x = VFTFeedForward(24, 6), torch.randn(3, 24)
    f = VFTFeedForward(24, 6, stabilizer=kind)
    assert sum(p.numel() for p in f.parameters()) - sum(p.numel() for p in plain.parameters()) == size
    before = f(x)
    f.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(f(x), plain(x))
    for parameter in f.stabilizer.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(f(x), plain(x))
    assert before.shape == x.shape


def test_without_being_asked_for_there_is_none() -> None:
    assert VFTFeedForward(24, 6).stabilizer is None


@pytest.mark.parametrize("wrong", [{"act": "gellu"}, {"stabilizer": "danse"}])
def test_an_unknown_name_is_refused_with_the_nearest(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="Did you mean"):
        VFTFeedForward(24, 6, **wrong)

"""The vein: orthonormal at first, ε 0 on it and 1 across it, and normals that stay normal."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.native import VeinProjector
from layerwise.native.projector import orthonormal_rows


def vein(**options: bool) -> VeinProjector:
    torch.manual_seed(0)
    return VeinProjector(32, 8, **options)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"orthogonal": True}])
def test_it_starts_as_an_orthogonal_projector(options: dict[str, bool]) -> None:
    p = vein(**options)
    V, U = p.rows(), p.columns()
    assert (V @ V.T - torch.eye(8)).norm() < 1e-5
    torch.testing.assert_close(U, V.T)
    P = U @ V
    torch.testing.assert_close(P @ P, P)
    torch.testing.assert_close(P, P.T)
    assert float(p.penalty()) < 1e-9


def test_two_independent_draws_would_be_no_projector() -> None:
    p = vein()
    torch.nn.init.orthogonal_(p.U)  # what the initialization must not do
    assert (p.V @ p.U).norm() < 0.75 * 8**0.5
    assert float(p.penalty()) > 1


@pytest.mark.parametrize(("d", "r"), [(8, 9), (8, 0)])
def test_a_rank_outside_is_refused(d: int, r: int) -> None:
    with pytest.raises(UsageError, match="1 … 8"):
        VeinProjector(d, r)


def test_the_full_rank_gives_every_token_back() -> None:
    p, h = VeinProjector(16, 16), torch.randn(3, 5, 16)
    torch.testing.assert_close(p.reconstruct(p(h)), h)


def test_epsilon_is_0_on_the_vein_and_1_across_it() -> None:
    p = vein().double()
    on = p.reconstruct(torch.randn(2, 7, 8, dtype=torch.float64))
    across = p.normal(torch.randn(2, 7, 32, dtype=torch.float64))
    assert float(p.off_plane(on)[0].max()) < 1e-6  # single precision starts it
    torch.testing.assert_close(p.off_plane(across)[0], torch.ones(2, 7, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float(p.off_plane(torch.zeros(1, 1, 32, dtype=torch.float64))[0]) == 0


def test_epsilon_lies_between_and_the_absolute_value_is_about_the_root_of_d_minus_r() -> None:
    p, h = VeinProjector(256, 32), torch.randn(4, 64, 256)
    rate, absolute = p.off_plane(h)
    assert 0 <= float(rate.min()) <= float(rate.max()) <= 1
    torch.testing.assert_close(absolute.mean(), torch.tensor((256 - 32) ** 0.5), rtol=0.05, atol=0)
    torch.testing.assert_close(rate, (h - h @ p.V.T @ p.U.T).norm(dim=-1) / (h.norm(dim=-1) + 1e-6))


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"orthogonal": True}])
def test_what_is_normal_is_orthogonal_to_the_vein_also_after_training_has_moved_it(options: dict[str, bool]) -> None:
    p = vein(**options).double()
    with torch.no_grad():
        for parameter in p.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    h = torch.randn(2, 5, 32, dtype=torch.float64)
    n = p.normal(h)
    assert float((n @ p.columns()).abs().max()) < 1e-9
    torch.testing.assert_close(p.normal(n), n)  # a projector
    torch.testing.assert_close(p.normal(p.columns().T[:2]), torch.zeros(2, 32, dtype=torch.float64), atol=1e-9, rtol=0)


def test_before_training_it_is_what_i_minus_p_leaves() -> None:
    p, h = vein().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(p.normal(h), h - p.reconstruct(p(h)), atol=1e-6, rtol=0)


def test_the_orthogonal_one_stays_orthonormal_under_steps() -> None:
    p = vein(orthogonal=True)
    for _ in range(3):
        (gradient,) = torch.autograd.grad((p(torch.randn(4, 32)) - 1).square().mean(), [p.V])
        with torch.no_grad():
            p.V -= 2 * gradient
    V = p.rows()
    assert (V @ V.T - torch.eye(8)).norm() < 1e-5
    assert (p.V @ p.V.T - torch.eye(8)).norm() > 1e-2, "the parameter itself did not move"


def test_making_orthonormal_rows_orthonormal_leaves_them() -> None:
    V = vein().V.detach()
    torch.testing.assert_close(orthonormal_rows(V), V)


def test_fitted_on_activations_it_keeps_what_they_span() -> None:
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(32, 8)).Q
    X = torch.randn(200, 8) @ basis.T
    p = vein()
    assert p.fit(X + 0.001 * torch.randn(200, 32)) is p
    assert float(p.off_plane(X)[0].max()) < 0.01
    torch.testing.assert_close(p.U, p.V.T)
    random = vein().off_plane(X)[0].mean()
    assert random > 0.5


def test_a_weight_of_zeros_ends_no_run() -> None:
    p = vein()
    torch.nn.init.zeros_(p.U)
    h = torch.randn(2, 32)
    torch.testing.assert_close(p.normal(h), h)

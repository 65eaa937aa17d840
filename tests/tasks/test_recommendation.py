"""NDCG against scikit-learn, the rest by hand; lists and pairs agree; users and not pairs are what was drawn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import ndcg_score, roc_auc_score
from torch import nn

import layerwise
from layerwise.data import Batch, Data
from layerwise.errors import DataError
from layerwise.tasks.recommendation import Recommendation
from tests.tasks.splitting import SPLITS, evaluated


def lists() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores, taken = torch.randn(12, 9, generator=generator), (torch.rand(12, 9, generator=generator) < 0.4).float()
    taken[torch.rand(12, 9, generator=generator) < 0.15] = math.nan
    taken[4] = 0  # took nothing: nothing to judge
    return scores, taken


@pytest.mark.parametrize("sizes", SPLITS)
def test_figures_are_means_over_users_however_the_data_are_split(sizes: tuple[int, ...]) -> None:
    scores, taken = lists()
    means = evaluated(Recommendation(depth=3), scores, Batch((scores,), {}, taken), sizes).means()
    wanted: dict[str, list[float]] = {"ndcg": [], "recall": [], "precision": [], "auc": []}
    for s, t in zip(scores, taken, strict=True):
        s, t = s[~t.isnan()], t[~t.isnan()]
        if not 0 < t.sum() < len(t):
            continue
        hits = float(t[s.argsort(descending=True)[:3]].sum())
        wanted["ndcg"].append(ndcg_score(t[None], s[None], k=3))
        wanted["recall"].append(hits / float(t.sum()))
        wanted["precision"].append(hits / 3)
        wanted["auc"].append(roc_auc_score(t, s))
    count = len(wanted["auc"])
    assert 8 < count < 12
    for name, values in wanted.items():
        assert means[name] == pytest.approx(sum(values) / count, abs=1e-6), name
    known = ~taken.isnan()
    assert means["loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(scores[known], taken[known])), rel=1e-6)


def test_pairs_in_any_order_are_judged_as_the_lists_they_make_up() -> None:
    scores, taken = lists()
    users, items = (~taken.isnan()).nonzero(as_tuple=True)
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(0))
    users, items = users[order], items[order]
    labels = torch.stack([users.float() + 1000, taken[users, items]], 1)
    pairs = evaluated(Recommendation(), scores[users, items], Batch((users,), {}, labels), (40, len(users) - 40))
    whole = evaluated(Recommendation(), scores, Batch((scores,), {}, taken))
    assert pairs.means() == pytest.approx(whole.means(), rel=1e-6)
    assert pairs.stderr()["ndcg"] == pytest.approx(whole.stderr()["ndcg"], rel=1e-6)  # whole users are left out, not pairs


def test_one_score_for_everything_earns_nothing() -> None:
    scores, taken = torch.zeros(12, 20), torch.zeros(12, 20)
    taken[:, :3] = 1
    means = evaluated(Recommendation(), scores, Batch((scores,), {}, taken)).means()
    assert (means["ndcg"], means["recall"], means["auc"]) == (0.0, 0.0, 0.5)


def test_a_label_that_is_neither_taken_nor_not_names_its_row() -> None:
    with pytest.raises(DataError, match=r"LW-D34 .*row 1"):
        Recommendation().check(Batch((), {}, torch.tensor([[7.0, 1], [8, 4]])), torch.zeros(2))
    with pytest.raises(DataError, match="user, taken"):
        Recommendation().losses(torch.zeros(3), Batch((), {}, torch.zeros(3)), None)


def test_a_recommender_is_analyzed_by_name() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 9))
    (_, taken), x = lists(), torch.randn(12, 6)
    model = layerwise.load(network, task="recommendation")
    report = layerwise.analyze(model, Data.of([(x[:7], taken[:7]), (x[7:], taken[7:])]), ["gradient_based", "layer_ablation"])
    assert report.removal is not None
    assert report.removal.metric == "ndcg"
    assert report.metrics == evaluated(Recommendation(), model.predict(x), Batch((x,), {}, taken)).means() | {
        "loss": pytest.approx(report.metrics["loss"])
    }
    assert all(math.isfinite(v) and v > 0 for v in report.scores["gradient_based"].usable().values())

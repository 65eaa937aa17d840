"""Rounds of training, pruning and rewinding against the paper's loop in a few lines."""

from __future__ import annotations

import pytest
import torch

from layerwise.compress.lottery_ticket import LotteryTicket
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.sparsity import weights_of
from layerwise.supplies import Supplies
from layerwise.training import TrainingSettings, train_
from tests.models import CASES

NAMES = ["blocks.0", "blocks.1"]
SETTINGS = {"epochs": 2, "learning_rate": 0.05, "optimizer": "sgd"}


def supplies() -> Supplies:
    data = CASES["residual"].data(5, 4, 3)
    return Supplies(training=data, progress=lambda done, steps: None)


def ticket(**settings: float) -> UniversalModel:
    plan = CompressionPlan((step_of(LotteryTicket(**SETTINGS | settings), NAMES),))  # type: ignore[arg-type]
    return apply_plan(CASES["residual"].model(), plan, supplies()).model


def slow(rate: float, rounds: int, early_epochs: int = 0) -> UniversalModel:
    model = CASES["residual"].model()
    recipe = TrainingSettings(**SETTINGS, keep_best=False)  # type: ignore[arg-type]
    if early_epochs:
        train_(
            model,
            supplies(),
            settings=TrainingSettings(**SETTINGS | {"epochs": early_epochs, "schedule": "constant"}, keep_best=False),
        )  # type: ignore[arg-type]
    early = {k: v.clone() for k, v in model.module.state_dict().items()}
    masks = {n: torch.ones_like(w) for n, w in weights_of(model.module, NAMES).items()}

    def mask(module: torch.nn.Module) -> None:
        with torch.no_grad():
            for name, m in masks.items():
                module.get_parameter(name).mul_(m)

    for number in range(rounds):
        train_(model, supplies(), settings=recipe, after_step=mask)
        flat = torch.cat([w.detach().abs().reshape(-1) for w in weights_of(model.module, NAMES).values()]).double()
        count = round(len(flat) * (1 - (1 - rate) ** (number + 1)))
        threshold = flat.sort().values[count - 1]
        masks = {n: (w.detach().abs().double() > threshold).float() for n, w in weights_of(model.module, NAMES).items()}
        model.module.load_state_dict(early)
        mask(model.module)
    train_(model, supplies(), settings=recipe, after_step=mask)
    return model


@pytest.mark.parametrize("early_epochs", [0, 1])
def test_it_follows_the_slow_way(early_epochs: int) -> None:
    found, wanted = ticket(rate=0.3, rounds=2, early_epochs=early_epochs), slow(0.3, 2, early_epochs)
    for (name, a), b in zip(found.module.named_parameters(), wanted.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
        assert torch.equal(a == 0, b == 0), name


def test_the_rounds_do_not_prune_more_than_they_say() -> None:
    weights = list(weights_of(ticket(rate=0.2, rounds=3, epochs=1).module, NAMES).values())
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == round(total * (1 - 0.8**3))


def test_without_learning_what_is_left_is_what_came() -> None:
    """Rewound to the weights it came with, not to those of the last training."""
    found, start = ticket(rate=0.5, rounds=1, learning_rate=0.0).module, CASES["residual"].model().module
    for name, weight in weights_of(start, NAMES).items():
        left = found.get_parameter(name)
        assert torch.equal(left[left != 0], weight[left != 0])


def test_bad_settings_are_refused() -> None:
    for setting, value in (("rate", 1.0), ("rounds", 0), ("early_epochs", -1)):
        with pytest.raises(UsageError, match=setting):
            LotteryTicket(**{setting: value})  # type: ignore[arg-type]

"""A hand-set policy that balances the pole: its return, what each block is worth to it, and the loss of recorded actions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise
from layerwise.damage import evaluate_skips
from layerwise.data import Batch, Data
from layerwise.errors import DataError, UsageError
from layerwise.measure import evaluate
from layerwise.task import task_named
from layerwise.tasks.reinforcement_learning import ReinforcementLearning

gymnasium = pytest.importorskip("gymnasium")
TASK = ReinforcementLearning("CartPole-v1", episodes=3)


class Residual(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(8))
            self.down.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x))


class Policy(nn.Module):
    """Features 0 … 3 are the state. Block 1 writes which way the pole falls into feature 4, which is all that the head reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        vital, idle = torch.zeros(8, 8), torch.zeros(3, 8, 8)
        vital[4, :4] = torch.tensor([0.1, 0.5, 1.0, 1.0])
        idle[:, 5:] = torch.randn(3, 3, 8)
        self.stem, self.head = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)
        self.blocks = nn.Sequential(Residual(idle[0]), Residual(vital), Residual(idle[1]), Residual(idle[2]))
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(8, 4))
            self.head.weight.zero_()[:, 4] = torch.tensor([-4.0, 4.0])

    def forward(self, state: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(state)))


def recorded(policy: nn.Module) -> Data:
    states = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        return Data.of([(s, policy(s).argmax(-1)) for s in states.split(16)])


def test_the_return_is_that_of_playing_one_episode_after_the_other() -> None:
    policy = Policy()
    data, wanted = recorded(policy), []
    for episode in range(3):
        environment: Any = gymnasium.make("CartPole-v1")
        state, over, total = environment.reset(seed=episode)[0], False, 0.0
        while not over:
            with torch.no_grad():
                action = int(policy(torch.tensor(state)[None]).argmax())
            state, reward, terminated, truncated, _ = environment.step(action)
            over, total = terminated or truncated, total + reward
        wanted.append(total)
    evaluation = evaluate(layerwise.load(policy, task=TASK), data)
    assert evaluation.means()["mean_return"] == sum(wanted) / 3 > 475
    assert evaluation.means()["success_rate"] == 1.0
    assert evaluation.means()["kl"] == 0.0
    assert evaluation.means()["agreement"] == 1.0


def test_without_the_vital_block_the_pole_falls_and_without_an_idle_one_it_does_not() -> None:
    policy = Policy()
    model, data = layerwise.load(policy, task=TASK), recorded(policy)
    sets = [frozenset[str](), frozenset(["blocks.1"]), frozenset(["blocks.2"])]
    found = evaluate_skips(model, data, sets)
    whole, vital, idle = (found[s].means() for s in sets)
    assert vital["mean_return"] < 20 < 475 < idle["mean_return"] == whole["mean_return"]
    assert vital["kl"] > 0.1 > idle["kl"] == 0.0


def test_the_policy_is_analyzed_and_planned_by_its_return() -> None:
    policy = Policy()
    data = recorded(policy)
    model = layerwise.load(policy, task="reinforcement_learning(environment=CartPole-v1, episodes=2)")
    report = layerwise.analyze(model, data, ["gradient_based", "layer_ablation"])
    assert max(report.scores["layer_ablation"].usable(), key=report.scores["layer_ablation"].__getitem__) == "blocks.1"
    assert report.removal is not None
    assert report.removal.metric == "mean_return"
    plan = layerwise.plan(model, report, ["params<=0.6x", "mean_return>=0.95x"], data, "drop_layers")
    assert "blocks.1" not in plan.steps[0].layers
    assert plan.predicted["mean_return"] >= 475


def test_the_loss_is_that_of_the_recorded_actions_times_their_advantages() -> None:
    torch.manual_seed(0)
    logits, actions, advantages = torch.randn(6, 3), torch.randint(0, 3, (6,)), torch.randn(6)
    plain, weighted = (
        TASK.losses(logits, Batch((logits,), {}, labels), None)[0]
        for labels in (actions, torch.stack([actions.float(), advantages], 1))
    )
    entropies = F.cross_entropy(logits, actions, reduction="none").double()
    torch.testing.assert_close(plain, entropies)
    torch.testing.assert_close(weighted, entropies * advantages.double())


def test_a_single_episode_has_no_standard_error() -> None:
    policy = Policy()
    model = layerwise.load(policy, task=ReinforcementLearning("CartPole-v1", episodes=1))
    assert math.isnan(evaluate(model, recorded(policy)).stderr()["mean_return"])


def test_what_is_missing_is_told() -> None:
    with pytest.raises(UsageError, match="environment=CartPole-v1"):
        task_named("reinforcement_learning").check(Batch((), {}, torch.zeros(2)), torch.zeros(2, 2))
    with pytest.raises(DataError, match=r"LW-D34 .*action 5 in row 1"):
        TASK.check(Batch((), {}, torch.tensor([0, 5])), torch.zeros(2, 2))
    with pytest.raises(DataError, match=r"\(samples, actions\)"):
        TASK.losses(torch.zeros(2, 2), Batch(()), None)

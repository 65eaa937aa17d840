"""Reinforcement learning: a policy with discrete actions, judged by the episodes that it plays.

Decision: what is differentiated and ablated is the policy's log-likelihood of recorded actions, because a return is noisy and has
no gradient; what the model is judged by is the return, measured by playing. Every model plays the same seeded episodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.data import Batch, Data
from layerwise.errors import DataError, UsageError, missing_dependency
from layerwise.tasks._contract import TASKS, Acted, Figures, Task
from layerwise.tasks.fidelity import Fidelity

if TYPE_CHECKING:
    from layerwise.model import UniversalModel


@TASKS.register("reinforcement_learning")
@dataclass(frozen=True)
class ReinforcementLearning(Task):
    """Outputs are action logits ``(samples, actions)`` of observed states; labels the actions taken, ``(samples,)``, or actions
    and advantages ``(samples, 2)``.

    Loss: −advantage · log π(action | state), nats; without advantages it is behaviour cloning. Metrics on the recorded states:
    ``kl``, the divergence of the policy from that of the uncompressed model, and ``agreement`` of their preferred actions. By
    playing `episodes` of the Gymnasium `environment` with the preferred actions, from the seeds `seed`, `seed` + 1, …: the
    ``mean_return`` and, where the environment says what solves it, the ``success_rate``. The environment's observations are given
    to the model in float32, one row per episode. Continuous actions are not supported.
    """

    environment: str = ""
    episodes: int = 10
    seed: int = 0
    name: ClassVar[str] = "reinforcement_learning"
    quality: ClassVar[str] = "mean_return"
    higher_is_better: ClassVar[bool] = True

    def figures(self, output: Tensor, batch: Batch, reference: Tensor | None) -> Figures:
        losses = self.likelihood(output, batch, torch.Generator()).double()
        compared = Fidelity().figures(output, batch, output if reference is None else reference)
        return {
            "loss": (losses, torch.ones_like(losses)),
            "kl": compared["divergence"],
            "agreement": compared["agreement"],
        }

    def likelihood(self, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        actions, advantages = self._taken(output, batch)
        return F.cross_entropy(output.float(), actions, reduction="none") * advantages

    def acted(self, model: UniversalModel, data: Data) -> Acted:
        returns, solved = played(model, self._environment(), self.episodes, self.seed)
        found = {"mean_return": returns}
        if solved is not None:
            found["success_rate"] = [float(r >= solved) for r in returns]
        return {name: _mean(values) for name, values in found.items()}

    def check(self, batch: Batch, output: Tensor) -> None:
        self._environment()
        labels = batch.labels
        if not isinstance(labels, Tensor) or labels.device.type != "cpu" or output.dim() != 2:
            return
        taken = labels[:, 0] if labels.dim() == 2 else labels
        wrong = (taken < 0) | (taken >= output.shape[1])
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            found, actions = taken[row].item(), output.shape[1]
            what = f"The action {found:g} in row {row} of the batch lies outside the policy's {actions} actions."
            raise DataError(what, remedy="Check the action column.", code="LW-D34")

    def _environment(self) -> str:
        if not self.environment:
            raise UsageError(
                "Which environment the policy acts in is not known.",
                remedy="Give task='reinforcement_learning(environment=CartPole-v1)', or use task='fidelity' without episodes.",
            )
        return self.environment

    @staticmethod
    def _taken(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.labels
        fits = isinstance(labels, Tensor) and (labels.shape == output.shape[:1] or labels.shape == (len(output), 2))
        if not fits or output.dim() != 2:
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                f"Reinforcement learning needs action logits (samples, actions) and labels: actions (samples,), or actions and "
                f"advantages (samples, 2); got {tuple(output.shape)} and {found}."
            )
        given = labels.to(output.device)
        if given.dim() == 1:
            return given.long(), torch.ones(len(given), device=output.device)
        return given[:, 0].long(), given[:, 1].float()


def played(model: UniversalModel, environment: str, episodes: int, seed: int) -> tuple[list[float], float | None]:
    """The return of each episode, and the return from which on the environment counts as solved, if it says so.

    All episodes go on side by side, one forward per step, until each is over. Raises `MissingDependency` without Gymnasium.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise missing_dependency("gymnasium", "rl", "Playing episodes") from error
    environments = [gymnasium.make(environment) for _ in range(episodes)]
    try:
        return _returns(model, environments, seed), environments[0].spec.reward_threshold if environments[0].spec else None
    finally:
        for each in environments:
            each.close()


def _returns(model: UniversalModel, environments: list[Any], seed: int) -> list[float]:
    states = {i: each.reset(seed=seed + i)[0] for i, each in enumerate(environments)}
    totals = [0.0] * len(environments)
    while states:
        rows = torch.stack([torch.as_tensor(state, dtype=torch.float32) for state in states.values()])
        actions = model.predict(Batch((rows.to(model.device),))).argmax(-1).tolist()
        for i, action in zip(list(states), actions, strict=True):
            states[i], reward, terminated, truncated, _ = environments[i].step(action)
            totals[i] += float(reward)
            if terminated or truncated:
                del states[i]
    return totals


def _mean(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN for a single episode."""
    mean, n = sum(values) / len(values), len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan

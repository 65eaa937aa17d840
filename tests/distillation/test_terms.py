"""Each loss against a slow replica in float64 that follows its definition, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerwise.data import Batch
from layerwise.distillation.attention import Attention, attention_loss
from layerwise.distillation.contrastive import Contrastive, contrastive_loss
from layerwise.distillation.feature import Feature, feature_loss
from layerwise.distillation.relation import Relation, pooled, relation_loss
from layerwise.distillation.response import Response, direction_loss, soft_binary_loss, soft_loss, value_loss
from layerwise.distillation.seen import Maps, Seen
from layerwise.errors import UsageError
from layerwise.task import Classification, MultiLabel, Regression, task_named


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softened(row: Tensor, temperature: float) -> list[float]:
    powers = [math.exp(float(x) / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def test_response_is_kl_times_the_squared_temperature() -> None:
    student, teacher, t = random(5, 7), random(5, 7, seed=1), 4.0
    total = 0.0
    for mine, other in zip(student, teacher, strict=True):
        p, q = softened(other, t), softened(mine, t)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(soft_loss(student, teacher, t)) == pytest.approx(t * t * total / 5, rel=1e-12)
    assert float(soft_loss(teacher, teacher, t)) == pytest.approx(0, abs=1e-12)


def test_a_forbidden_class_makes_no_nan() -> None:
    teacher = random(2, 3)
    teacher[:, 1] = -math.inf
    student = teacher.clone().requires_grad_()
    loss = soft_loss(student + random(2, 3, seed=1), teacher, 2.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_tokens_are_rows_and_padding_is_none() -> None:
    """As many tokens as there are, the loss is that of one row; fails if it sums over tokens or counts padding."""
    row, other = random(1, 6), random(1, 6, seed=1)
    alone = soft_loss(row, other, 4.0)
    student, teacher = row.expand(2, 5, 6).clone(), other.expand(2, 5, 6).clone()
    student[0, 3:] = 99.0
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    batch = Batch((), {"input_ids": mask, "attention_mask": mask})
    term = Response(4.0).resolved(task_named("language_modelling"), student)
    assert float(term.loss(Seen(student), Seen(teacher), batch, None)) == pytest.approx(float(alone), rel=1e-6)


def test_other_outputs_have_their_own_divergence() -> None:
    student, teacher = random(4, 3), random(4, 3, seed=1)
    total = 0.0
    for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-b / 2)), 1 / (1 + math.exp(-a / 2))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(soft_binary_loss(student, teacher, 2.0)) == pytest.approx(4 * total / 12, rel=1e-9)
    assert float(value_loss(student, teacher)) == pytest.approx(float((student - teacher).square().mean() / 2), rel=1e-12)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(student, teacher, strict=True)]
    assert float(direction_loss(student, teacher)) == pytest.approx(1 - sum(cosines) / 4, rel=1e-9)
    kinds = {
        MultiLabel(): "questions",
        Regression(): "values",
        Classification(): "classes",
        task_named("retrieval"): "directions",
    }
    assert {task: Response().resolved(task, student).kind for task in kinds} == kinds
    values = Response(kind="values").loss(Seen(student[:, 0]), Seen(teacher[:, 0]), Batch((student,)), None)
    assert float(values) == pytest.approx(float((student[:, 0] - teacher[:, 0]).square().mean() / 2))


def test_features_are_compared_relative_to_the_teachers_and_without_padding() -> None:
    student, teacher = random(2, 4, 3), random(2, 4, 3, seed=1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    apart = energy = 0.0
    for i in range(2):
        for j in range(4):
            if mask[i, j]:
                apart += sum((float(student[i, j, k]) - float(teacher[i, j, k])) ** 2 for k in range(3))
                energy += sum(float(teacher[i, j, k]) ** 2 for k in range(3))
    batch = Batch((), {"input_ids": mask, "attention_mask": mask})
    seen = Seen(student, {"a": student}), Seen(teacher, {"a": teacher})
    assert float(Feature().loss(*seen, batch, None)) == pytest.approx(apart / energy, rel=1e-12)
    assert float(feature_loss(torch.zeros_like(teacher), teacher)) == pytest.approx(1)


@pytest.mark.parametrize(("mine", "other", "dim"), [((2, 4, 3), (2, 4, 5), 2), ((2, 3, 4, 4), (2, 5, 4, 4), 1)])
def test_another_width_is_projected(mine: tuple[int, ...], other: tuple[int, ...], dim: int) -> None:
    student, teacher = random(*mine).float(), random(*other, seed=1).float()
    seen = Seen(student, {"b.0": student}), Seen(teacher, {"b.0": teacher})
    term = Feature()
    term.check(*seen, Classification())
    companion = term.companion(*seen)
    assert companion is not None
    (weight, bias) = (p.detach() for p in companion.parameters())
    moved = (student.movedim(dim, -1) @ weight.T + bias).movedim(-1, dim)
    expected = (moved - teacher).square().sum() / teacher.square().sum()
    assert float(term.loss(*seen, Batch((student,)), companion).detach()) == pytest.approx(float(expected), rel=1e-5)
    crooked = random(2, 6, 5).float()
    with pytest.raises(UsageError, match="more than the width"):
        term.check(seen[0], Seen(crooked, {"b.0": crooked}), Classification())


def test_relations_are_cosines_between_different_samples() -> None:
    student, teacher = random(4, 3), random(4, 6, seed=1)

    def cosine(x: Tensor, i: int, j: int) -> float:
        return float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))

    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = sum((cosine(student, i, j) - cosine(teacher, i, j)) ** 2 for i, j in pairs) / 12
    assert float(relation_loss(student, teacher)) == pytest.approx(expected, rel=1e-9)
    assert float(relation_loss(student[:1], teacher[:1])) == 0
    tokens, mask = random(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.allclose(pooled(tokens, mask)[0], tokens[0, :2].mean(0))
    batch = Batch((), {"input_ids": mask, "attention_mask": mask})
    spoiled = tokens.clone()
    spoiled[0, 2] = 50.0
    seen = [Seen(x, {"a": x}) for x in (spoiled, tokens)]
    assert float(Relation().loss(seen[0], seen[1], batch, None)) == pytest.approx(0, abs=1e-12)


def test_attention_is_kl_per_query_and_heads_are_averaged_where_they_differ() -> None:
    student, teacher = random(2, 2, 3, 4).softmax(-1), random(2, 2, 3, 4, seed=1).softmax(-1)
    keep = torch.tensor([[True, True, False], [True, True, True]])

    def divergence(mine: Tensor, other: Tensor) -> float:
        total = rows = 0.0
        for i, j in keep.nonzero().tolist():
            rows += 1
            for h in range(mine.shape[1]):
                kl = sum(float(p) * math.log(float(p) / float(q)) for p, q in zip(other[i, h, j], mine[i, h, j], strict=True))
                total += kl / mine.shape[1]
        return total / rows

    assert float(attention_loss(student, teacher, keep)) == pytest.approx(divergence(student, teacher), rel=1e-9)
    one = student.mean(1, keepdim=True)
    assert float(attention_loss(one, teacher, keep)) == pytest.approx(divergence(one, teacher.mean(1, keepdim=True)), rel=1e-9)
    calls = [Maps(student, keep, cross=False), Maps(teacher, keep, cross=True)]
    seen = Seen(student, {}, {"a": calls}), Seen(student, {}, {"a": calls[::-1]})
    for kind, expected in (("self", divergence(student, student)), ("both", 0.0)):
        assert kind == "both" or float(Attention(kind).loss(seen[0], seen[0], Batch(), None)) == pytest.approx(expected, abs=1e-9)
    assert float(Attention("cross").loss(seen[0], seen[1], Batch(), None)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UsageError, match="No cross attention"):
        Attention("cross").check(Seen(student, {}, {"a": calls[:1]}), seen[1], Classification())


def test_contrast_finds_its_own_among_the_teachers() -> None:
    student, teacher = random(4, 3), random(4, 3, seed=1)
    cosines = [[float(a @ b / (a.norm() * b.norm())) / 0.07 for b in teacher] for a in student]
    total = 0.0
    for i in range(4):
        total -= cosines[i][i] - math.log(sum(math.exp(c) for c in cosines[i]))
        total -= cosines[i][i] - math.log(sum(math.exp(row[i]) for row in cosines))
    assert float(contrastive_loss(student, teacher)) == pytest.approx(total / 8, rel=1e-9)
    towers, others = torch.stack([student, teacher], 1), torch.stack([teacher, student], 1)
    both = Contrastive().loss(Seen(towers), Seen(others), Batch((student,)), None)
    swapped = contrastive_loss(student, teacher) + contrastive_loss(teacher, student)
    assert float(both) == pytest.approx(float(swapped) / 2)
    with pytest.raises(UsageError, match="compares embeddings"):
        Contrastive().check(Seen(student), Seen(teacher), Classification())


def test_outputs_that_are_no_distribution_are_refused_in_words() -> None:
    output = random(2, 3)
    with pytest.raises(UsageError, match="detection: they are no distribution"):
        Response().check(Seen(output), Seen(output), task_named("detection"))
    with pytest.raises(UsageError, match="answer different questions"):
        Response().check(Seen(output), Seen(random(2, 4)), Classification())
    with pytest.raises(UsageError, match="temperature"):
        Response(0.0)

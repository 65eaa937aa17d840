from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.attention_maps import attention_watched
from layerwise.compress.distill import Distill
from layerwise.data import Batch, Data
from layerwise.distillation import Distillation, Memory, cut_student, match, match_by_scores, paired_layers
from layerwise.distillation.objective import Lessons
from layerwise.distillation.seen import look
from layerwise.distillation.vocabulary import check_vocabulary
from layerwise.distillation.weighting import EVERY, WEIGHTINGS, balanced, gradient_norm
from layerwise.errors import UsageError
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies
from layerwise.task import Classification, task_named
from layerwise.tensors import state
from layerwise.training import Portion, TrainingSettings, train_
from tests.models import CASES

RECIPE = TrainingSettings(epochs=3, learning_rate=0.01, keep_best=False)
ALL = ("response", "feature", "relation", "attention")


def bert(layers: int = 3, width: int = 32, heads: int = 4, vocabulary: int = 100, **more: Any) -> UniversalModel:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(layers + width)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=64,
        **more,
    )
    return UniversalModel(BertForSequenceClassification(config).eval(), task=Classification(), example=CASES["bert"].batch(2))


def supplies(teacher: UniversalModel, **more: Any) -> Supplies:
    data = CASES["bert"].data(6, 5, 4)
    return Supplies(training=data, validation=data, teacher=teacher, **more)


def weights(model: UniversalModel) -> list[torch.Tensor]:
    return [t.clone() for t in state(model.module).values()]


def test_every_objective_at_once_teaches_a_narrower_student_and_leaves_nothing_behind() -> None:
    """Fails if projections stay, if the teacher changes, or if what is learned is not what the teacher says."""
    teacher, student = bert(4), bert(2, width=16, heads=2)
    before, names = weights(teacher), list(state(student.module))
    trained = train_(student, supplies(teacher), Distillation(ALL, weighting="uncertainty"), replace(RECIPE, epochs=12))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(teacher), strict=True))
    assert list(state(student.module)) == names
    first, last = trained.epochs[1].figures, trained.epochs[-1].figures
    for part in ("feature", "relation", "attention"):
        assert last[part] < first[part], part
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*teacher.module.modules(), *student.module.modules()))


def test_the_teacher_answers_once_and_its_answers_are_those_of_a_teacher_without_memory(tmp_path: Path) -> None:
    results = []
    teacher, memory = bert(3), Memory()
    for settings in (
        Distillation(ALL, cache="none"),
        Distillation(ALL, memory=memory),
        Distillation(ALL, memory=memory),
        Distillation(ALL, cache="disk"),
        Distillation(ALL, cache="disk"),
    ):
        student = bert(2)
        number = len(results)
        given = supplies(teacher, checkpoint=tmp_path if settings.cache == "disk" else None)
        settings_ = replace(RECIPE, seed=0)
        if settings.cache == "disk" and number == 4:  # training begins again, on what the teacher left
            for step in tmp_path.glob("step-*"):
                for file in step.iterdir():
                    file.unlink()
                step.rmdir()
            entry = next((tmp_path / "teacher").glob("*/0-*")) / "seen.safetensors"
            entry.write_bytes(entry.read_bytes()[:-3])  # and one of its answers is torn
        lesson = settings.begin(student, given)
        assert isinstance(lesson, Lessons)
        train_(student, given, settings, settings_)
        results.append(weights(student))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert (memory.forwards, memory.answered) == (3, 15)


def test_an_interrupted_distillation_ends_at_the_same_bits(tmp_path: Path) -> None:
    teacher, settings = bert(3), Distillation(("response", "feature"), weighting="gradient_norm", layer_map="uniform")
    whole, broken, again = bert(2, width=16), bert(2, width=16), bert(2, width=16)
    expected = train_(whole, supplies(teacher), settings, RECIPE)

    seen = []

    def stop(gradient: torch.Tensor) -> None:
        """Ctrl-C in a backward pass, when the step's parts of the loss are noted already."""
        seen.append(gradient)
        if len(seen) == 6:
            raise KeyboardInterrupt

    broken.module.classifier.bias.register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train_(broken, supplies(teacher, checkpoint=tmp_path), settings, RECIPE)
    assert train_(again, supplies(teacher, checkpoint=tmp_path), settings, RECIPE) == expected
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_maps_with_their_graph_have_the_gradient_of_the_model_itself() -> None:
    model, batch = bert(2), CASES["bert"].batch(3)
    maps: list[torch.Tensor] = []
    with attention_watched(model.layers, 3, lambda _, c: maps.append(c.weights(slice(0, 9))[0]), None, live=True):
        model.output(batch)
    query = model.layers[0].module.attention.self.query.weight
    (found,) = torch.autograd.grad(maps[0].square().sum(), query)
    eager = bert(2, attn_implementation="eager")
    raw = eager.module(**batch.kwargs, output_attentions=True)
    (wanted,) = torch.autograd.grad(raw.attentions[0].square().sum(), eager.layers[0].module.attention.self.query.weight)
    assert found.abs().max() > 0
    # the model's own maps give padding's queries weights too; so do ours
    assert torch.allclose(found.float(), wanted, rtol=1e-3, atol=1e-6)


def test_cross_attention_is_told_from_self_attention() -> None:
    model, batch = CASES["t5"].model(), CASES["t5"].batch(2)
    seen = look(model, batch, (), [layer.name for layer in model.layers])
    kinds = {name: [call.cross for call in calls] for name, calls in seen.attention.items()}
    assert sorted(map(tuple, kinds.values())) == [(False,)] * 3 + [(False, True)] * 3


def test_layers_are_matched_last_to_last_and_by_importance() -> None:
    teacher = [f"t{i}" for i in range(6)]
    assert match(["a", "b", "c"], teacher) == {"a": "t1", "b": "t3", "c": "t5"}
    assert match(["a", "b"], teacher, lambda a, b: (a, b) != ("b", "t5")) == {"a": "t2", "b": "t4"}
    scores = dict(zip(teacher, [0.3, 0.1, 0.2, 0.9, 0.1, 0.0], strict=True))
    assert match_by_scores(["a", "b", "c"], teacher, scores) == {"a": "t0", "b": "t3", "c": "t5"}
    student, big = bert(2), bert(4)
    found = paired_layers(Distillation(("feature",)), student, big, CASES["bert"].batch(3))
    assert list(found.values()) == ["bert.encoder.layer.1", "bert.encoder.layer.3"]
    settings = Distillation(("feature",), layer_map={student.layers[0].name: "bert.encoder.layer.9"})
    with pytest.raises(UsageError, match=r"teacher has no layer .*layer\.9"):
        train_(student, supplies(big), settings, RECIPE)


def test_weights_balance_the_gradients_or_follow_the_uncertainty() -> None:
    w = nn.Parameter(torch.tensor([2.0, -1.0]))
    losses = lambda: [3 * w.square().sum(), 0.1 * w.sum()]  # noqa: E731  # two lines of it are clearer than a def
    norms = [6 * 5**0.5, 0.1 * 2**0.5]
    assert [gradient_norm(x, [w]) for x in losses()] == pytest.approx(norms, rel=1e-6)
    weighting = WEIGHTINGS["gradient_norm"]((1.0, 1.0))  # type: ignore[call-arg]
    total = weighting.total(losses(), [w])
    (gradient,) = torch.autograd.grad(total, w)
    mean = sum(norms) / 2
    expected = 6 * w.detach() * mean / norms[0] + 0.1 * mean / norms[1]
    assert torch.allclose(gradient, expected, rtol=1e-5)
    assert balanced([0.0, 1.0]).tolist() == [1.0, 0.5]
    assert EVERY > 1
    uncertain = WEIGHTINGS["uncertainty"]((1.0, 1.0))  # type: ignore[call-arg]
    uncertain.begin([4.0, 0.5])
    assert uncertain.weights() == pytest.approx([1 / 8, 1.0])
    at_optimum = torch.autograd.grad(uncertain.total([torch.tensor(4.0), torch.tensor(0.5)], []), list(uncertain.parameters()))
    assert at_optimum[0].abs().max() < 1e-6


def test_models_that_do_not_speak_the_same_language_are_refused() -> None:
    student, teacher = bert(2), bert(3, vocabulary=120)
    with pytest.raises(UsageError, match="vocabulary has 100 tokens and the teacher's 120"):
        train_(student, supplies(teacher), Distillation(), RECIPE)
    with pytest.raises(UsageError, match="2 classes and the teacher 3"):
        check_vocabulary(bert(2, id2label={0: "no", 1: "yes"}), bert(3, id2label={0: "no", 1: "yes", 2: "maybe"}))
    with pytest.raises(UsageError, match="Class 0 is 'no' to the student and 'yes'"):
        check_vocabulary(bert(2, id2label={0: "no", 1: "yes"}), bert(3, id2label={0: "yes", 1: "no"}))
    with pytest.raises(UsageError, match="answer different questions"):
        train_(student, supplies(bert(3, num_labels=4)), Distillation(), RECIPE)
    with pytest.raises(UsageError, match="the student itself"):
        train_(student, supplies(student), Distillation(), RECIPE)

    class Tokenizer:
        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

    student.adapter = replace(student.adapter, tokenizer=Tokenizer("a", "b", "c"))
    other = bert(3)
    other.adapter = replace(other.adapter, tokenizer=Tokenizer("a", "c", "b"))
    with pytest.raises(UsageError, match="'b' is 1 to one and 2 to the other"):
        check_vocabulary(student, other)


def test_a_dual_tower_follows_its_teacher() -> None:
    class Towers(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.query, self.document = nn.Linear(4, width), nn.Linear(4, width)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.query(x), self.document(x)

    torch.manual_seed(0)
    task, data = task_named("retrieval"), Data.of([Batch((torch.randn(8, 4),)) for _ in range(2)])
    student, teacher = (UniversalModel(Towers(w).eval(), task=task, example=data[0]) for w in (3, 5))
    given = Supplies(training=data, teacher=teacher)
    trained = train_(student, given, Distillation(("contrastive",), beta=0.0), replace(RECIPE, epochs=20, learning_rate=0.05))
    assert trained.epochs[-1].figures["contrastive"] < 0.7 * trained.epochs[1].figures["contrastive"]


def test_students_are_cut_evenly_or_by_importance() -> None:
    teacher = bert(6)
    names = [layer.name for layer in teacher.layers]
    assert [x.name for x in cut_student(teacher, 3).layers] == [names[0], names[2], names[5]]
    scores = dict(zip(names, [5.0, 4.0, 1.0, 2.0, 6.0, 3.0], strict=True))
    assert [x.name for x in cut_student(teacher, 3, scores).layers] == [names[0], names[1], names[4]]
    with pytest.raises(UsageError, match="is none"):
        cut_student(teacher, 6)
    assert len(teacher.layers) == 6


def test_the_plan_says_which_layers_learned_from_which() -> None:
    teacher = bert(4)
    drop = step_of(_method("drop_layers"), [teacher.layers[1].name, teacher.layers[2].name])
    learn = step_of(Distill("response+feature", epochs=1), [teacher.layers[0].name, teacher.layers[3].name])
    done = apply_plan(teacher, CompressionPlan((drop, learn)), supplies(teacher)).plan
    assert dict(done.steps[1].settings["layer_map"]) == {
        "bert.encoder.layer.0": "bert.encoder.layer.1",
        "bert.encoder.layer.3": "bert.encoder.layer.3",
    }
    assert CompressionPlan.from_json(done.to_json()) == done
    for wrong in ({"distill_type": "respnse"}, {"alpha": -1.0}, {"weighting": "none"}, {"cache": "ram"}, {"weights": [1.0, 2.0]}):
        with pytest.raises(UsageError):
            Distill(**wrong)


def _method(name: str) -> Any:
    from layerwise.method import METHODS

    return METHODS[name]()


def test_several_processes_ask_the_teacher_for_their_own_samples() -> None:
    teacher, student = bert(3), bert(2)
    lesson = Distillation(ALL).begin(student, supplies(teacher))
    batch = CASES["bert"].batch(6)
    with torch.no_grad():
        halves = [lesson.loss(batch.narrow(a, a + 3), Portion(0, a, a + 3, 6)) for a in (0, 3)]
    assert all(h.isfinite() for h in halves)
    assert isinstance(lesson, Lessons)
    assert lesson.teacher.store.forwards == 2

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.data import Batch
from layerwise.distillation.relation import relation_loss
from layerwise.errors import UsageError
from layerwise.plugins.distillation import ModelDistillationPlugin
from tests.models import AttendingNet, ResidualNet

PLUGIN = ModelDistillationPlugin(config={"epochs": 2, "learning_rate": 0.01})


class Net(ResidualNet):
    pass


def net(depth: int, width: int = 8, kind: type[ResidualNet] = Net) -> nn.Module:
    torch.manual_seed(depth)
    return kind(depth, width).eval()


def loader(labelled: bool = True) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 6, 8, generator=g)
    return [(x, x[:, :3].argmax(1)) if labelled else x for x in inputs]


def apart(student: nn.Module, teacher: nn.Module) -> float:
    x = torch.cat([batch[0] for batch in loader()])
    with torch.no_grad():
        return float((student(x).softmax(-1) - teacher(x).softmax(-1)).abs().mean())


@pytest.mark.parametrize("shape", ["student first", "by training data", "by keywords"])
def test_distill_model_takes_each_of_its_shapes(shape: str) -> None:
    teacher, student = net(4), net(2)
    far, before = apart(student, teacher), [p.clone() for p in teacher.parameters()]
    plugin = ModelDistillationPlugin(beta=0.0)
    if shape == "student first":
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.5)
        found = plugin.distill_model(student, teacher, loader(), optimizer)
    elif shape == "by training data":
        config = {"epochs": 4, "learning_rate": 0.02, "distill_type": "response+feature", "weighting": "gradient_norm"}
        found = plugin.distill_model(
            teacher_model=teacher, student_model=student, train_data=loader(), val_data=loader(), config=config
        )
        assert found.trained.best is not None
        assert {"response", "feature"} <= found.trained.epochs[-1].figures.keys()
    else:
        optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
        found = plugin.distill_model(student_model=student, teacher_model=teacher, train_dataloader=loader(), optimizer=optimizer)
    assert found.model.module is student
    assert apart(student, teacher) < far
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_tensors_give_losses_and_models_give_trained_students() -> None:
    a, b = (torch.randn(4, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    maps = torch.softmax(torch.randn(2, 3, 4, 4), -1)
    kl = nn.functional.kl_div((a / 2).log_softmax(-1), (b / 2).softmax(-1), reduction="batchmean") * 4
    assert float(PLUGIN.response_distillation(a, b, 2.0)) == pytest.approx(float(kl), rel=1e-5)  # type: ignore[arg-type]
    assert float(PLUGIN.response_distillation(student_logits=a, teacher_logits=b, temperature=2.0)) == pytest.approx(float(kl))  # type: ignore[arg-type]
    features = PLUGIN.feature_distillation({"x": a, "y": b}, {"x": b, "y": b})
    assert float(features) == pytest.approx(float((a - b).square().sum() / b.square().sum() / 2))  # type: ignore[arg-type]
    assert torch.equal(PLUGIN.relation_distillation(a, b), relation_loss(a, b))  # type: ignore[arg-type]
    assert float(PLUGIN.attention_distillation([maps, maps], [maps, maps])) == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
    teacher = net(4)
    for call in (
        lambda s: PLUGIN.response_distillation(teacher, s, loader(), 2.0, 1.0),
        lambda s: PLUGIN.feature_distillation(teacher, s, loader(), layer_mappings={"blocks.1": "blocks.3"}),
        lambda s: PLUGIN.relation_distillation(teacher_model=teacher, student_model=s, data_loader=loader()),
    ):
        student = net(2)
        far, found = apart(student, teacher), call(student)
        assert not isinstance(found, Tensor)
        assert found.trained.steps == 8
        assert apart(student, teacher) != far
    attending = PLUGIN.attention_distillation(net(4, kind=AttendingNet), net(2, kind=AttendingNet), loader(), "self")
    assert not isinstance(attending, Tensor)
    assert "attention" in attending.trained.epochs[-1].figures


def test_what_is_missing_or_unknown_is_named() -> None:
    student, teacher = net(2), net(4)
    with pytest.raises(UsageError, match="needs teacher, dataloader"):
        PLUGIN.distill_model(student)
    with pytest.raises(UsageError, match=r"no argument 'teacher_modle'.*teacher_model"):
        PLUGIN.distill_model(student, teacher_modle=teacher, dataloader=loader())
    with pytest.raises(UsageError, match=r"no setting 'temprature'.*temperature"):
        PLUGIN.distill_model(student, teacher, loader(), config={"temprature": 2})
    with pytest.raises(UsageError, match="cannot train by this RMSprop"):
        PLUGIN.distill_model(student, teacher, loader(), torch.optim.RMSprop(student.parameters()))
    with pytest.raises(UsageError, match="cannot train by this Adam"):
        PLUGIN.distill_model(student, teacher, loader(), torch.optim.Adam(student.parameters(), weight_decay=0.1))
    with pytest.raises(UsageError, match="learns from data"):
        PLUGIN.feature_distillation(teacher, student)
    with pytest.raises(UsageError, match="The layers differ"):
        PLUGIN.feature_distillation({"x": torch.ones(1, 1)}, {"y": torch.ones(1, 1)})


def test_the_report_compares_size_quality_and_speed() -> None:
    teacher, student = net(4), net(2)
    bare = PLUGIN.evaluate_compression(teacher, student)
    assert bare.params == tuple(sum(p.numel() for p in m.parameters()) for m in (teacher, student))
    assert bare.ratio == pytest.approx(bare.params[1] / bare.params[0])
    assert "not measured" in bare.to_markdown()
    full = PLUGIN.evaluate_compression(original_model=teacher, distilled_model=student, test_data=loader())
    assert full.before is not None
    assert full.after is not None
    x = torch.cat([batch[0] for batch in loader()])
    accuracy = float((student(x).argmax(1) == x[:, :3].argmax(1)).double().mean())
    assert full.after.metrics["accuracy"] == pytest.approx(accuracy)
    assert full.kept["accuracy"] == pytest.approx(accuracy / full.before.metrics["accuracy"])
    assert "accuracy" in full.to_markdown()
    assert full.to_dict()["after"]["params"] == bare.params[1]


def test_the_verb_trains_a_copy() -> None:
    teacher, student = lw.load(net(4), example=Batch((torch.ones(2, 8),))), net(2)
    before = [p.clone() for p in student.parameters()]
    found, trained = lw.distill(student, teacher, loader(), "response+feature", recipe=lw.TrainingSettings(epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert trained.steps == 8
    assert apart(found.module, teacher.module) < apart(student, teacher.module)

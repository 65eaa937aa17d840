"""ONNX files compute what torch computes; one that does not is refused by name of the layer, and never gets its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from layerwise.artifact import EXPORTERS, Artifact, export, exporter_for
from layerwise.data import Batch, Data
from layerwise.errors import ExportMismatch, UsageError, UserModelError
from layerwise.export import onnx as exporter
from layerwise.method import METHODS, CompressionMethod, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.supplies import Supplies
from tests.models import CASES, ResidualNet


def compressed(model: UniversalModel, method: CompressionMethod) -> UniversalModel:
    names = [layer.name for layer in model.layers if not method.treats(layer)]
    step = step_of(method, names[-2:] if method.selective else names)
    return apply_plan(model, CompressionPlan((step,)), Supplies(calibration=Data.of([model.example]))).model


def run(artifact: Artifact, batch: Batch) -> np.ndarray:
    """A user's own five lines, without any of ours."""
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    feed = dict(batch.kwargs) or {session.get_inputs()[0].name: batch.args[0]}
    (output,) = session.run(None, {i.name: feed[i.name].numpy() for i in session.get_inputs()})
    return output


@pytest.mark.parametrize("family", ["vit", "bert", pytest.param("t5", marks=pytest.mark.soak)])
def test_it_computes_what_torch_computes_at_any_batch_size(family: str, tmp_path: Path) -> None:
    case = CASES[family]
    model = case.model()
    fingerprint = model.fingerprint
    artifact = export(model, tmp_path / "model.onnx", case.data(4, 3))
    assert artifact.parity.relative <= 1e-5 < artifact.parity.bound
    assert artifact.parity.samples == 8
    assert artifact.proof().passed
    assert model.fingerprint == fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    for n in (1, 7):
        found, wanted = run(artifact, case.batch(n)), model.predict(case.batch(n)).numpy()
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_token_models_take_other_lengths(tmp_path: Path) -> None:
    case = CASES["gpt2"]
    model = case.model()
    artifact = export(model, tmp_path / "model.onnx", case.data(4))
    shorter = case.batch(3).map(lambda t: t[:, :5])
    assert np.abs(run(artifact, shorter) - model.predict(shorter).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("method", "smaller", "note"),
    [
        (METHODS["drop_layers"](), True, ""),
        (METHODS["half_precision"](dtype="float16"), True, ""),  # type: ignore[call-arg]
        (METHODS["half_precision"](dtype="bfloat16"), True, "no bfloat16 arithmetic"),  # type: ignore[call-arg]
        (METHODS["int8_dynamic"](), True, "MatMulInteger"),
        (METHODS["int8_static"](), True, "MatMulInteger"),
        (METHODS["magnitude_pruning"](), False, ""),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_compressed_models_keep_their_numbers(method: CompressionMethod, smaller: bool, note: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UniversalModel(ResidualNet(depth=4, width=64).eval(), example=Batch((torch.randn(2, 64),)))
    data = Data.of([torch.randn(4, 64), torch.randn(3, 64)])
    whole = export(model, tmp_path / "whole.onnx", data)
    artifact = export(compressed(model, method), tmp_path / "model.onnx", data)
    assert artifact.parity.relative <= artifact.parity.bound
    assert (artifact.bytes < 0.7 * whole.bytes) is smaller, (artifact.bytes, whole.bytes)
    assert note in " ".join(artifact.notes)
    assert bool(note) == bool(artifact.notes)


def fault(change: Callable[[onnx.ModelProto], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Changes the file between writing and checking; the list says that it happened."""
    fired: list[str] = []
    original = exporter.save

    def save(program: Any, path: Path, size: int) -> None:
        original(program, path, size)
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)
        fired.append(path.name)

    monkeypatch.setattr(exporter, "save", save)
    return fired


def patch_weight(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (weight,) = [i for i in model.graph.initializer if name in i.name]
        values = numpy_helper.to_array(weight).copy()
        values.flat[3] += 0.05
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    return change


@pytest.mark.parametrize("broken", ["blocks.1.up.weight", "blocks.3.down.bias"])
def test_one_changed_weight_is_refused_and_its_layer_named(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["residual"]
    fired = fault(patch_weight(broken), monkeypatch)
    with pytest.raises(ExportMismatch) as caught:
        export(case.model(), tmp_path / "model.onnx", case.data(4, 3))
    assert fired == ["model.onnx"]
    assert caught.value.code == "LW-V21"
    assert caught.value.place == broken[: len("blocks.1")]
    assert f"first layer that diverges is {caught.value.place}" in str(caught.value)
    assert "largest difference 0.0" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def one_integer_off(model: onnx.ModelProto) -> None:
    (first, *_) = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8]
    values = numpy_helper.to_array(first).copy()
    values[2, 3] += 1 if values[2, 3] < 100 else -1
    first.CopyFrom(numpy_helper.from_array(values, first.name))


def test_one_integer_off_is_refused_although_rounding_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["residual"]
    model = compressed(case.model(), METHODS["int8_dynamic"]())
    fired = fault(one_integer_off, monkeypatch)
    with pytest.raises(ExportMismatch) as caught:
        export(model, tmp_path / "model.onnx", case.data(4, 3))
    assert fired
    assert caught.value.place.startswith("blocks.")
    assert "bound 0.0001" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_one_changed_operator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: onnx.ModelProto) -> None:
        [n for n in model.graph.node if n.op_type == "Relu"][2].op_type = "Abs"

    fired = fault(change, monkeypatch)
    with pytest.raises(ExportMismatch) as caught:
        export(CASES["residual"].model(), tmp_path / "model.onnx", CASES["residual"].data(4))
    assert fired
    assert caught.value.place == "blocks.2"


def test_a_fault_after_all_layers_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(patch_weight("head.weight"), monkeypatch)
    with pytest.raises(ExportMismatch, match="after the last layer"):
        export(CASES["residual"].model(), tmp_path / "model.onnx", CASES["residual"].data(4))


def test_an_old_file_survives_a_failed_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(UsageError) as caught:
        export(CASES["residual"].model(), path, CASES["residual"].data(4))
    assert caught.value.code == "LW-C07"
    fault(patch_weight("head.weight"), monkeypatch)
    with pytest.raises(ExportMismatch):
        export(CASES["residual"].model(), path, CASES["residual"].data(4), force=True)
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    assert export(CASES["residual"].model(), path, CASES["residual"].data(4), force=True).bytes == path.stat().st_size > 1000


def test_beyond_one_file_the_weights_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "ONE_FILE", 100)
    artifact = export(CASES["residual"].model(), tmp_path / "model.onnx", CASES["residual"].data(4))
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert artifact.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert run(artifact, CASES["residual"].batch(3)).shape == (3, 3)


def test_nothing_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    artifact = export(CASES["residual"].model(), tmp_path / "model.onnx", CASES["residual"].data(4))
    content = artifact.path.read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content


def test_without_data_it_says_that_the_batch_was_made_up(tmp_path: Path) -> None:
    artifact = export(CASES["residual"].model(), tmp_path / "model.onnx")
    assert "no data was given" in artifact.notes[-1]


class Odd(torch.nn.Module):
    """Its forward depends on values, which a graph cannot say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_what_onnx_cannot_say_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserModelError) as caught:
        export(UniversalModel(Odd().eval()), tmp_path / "model.onnx", Data.of([torch.randn(3, 8)]))
    assert caught.value.code == "LW-U79"
    assert "Could not guard on data-dependent expression" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_chooses_the_exporter() -> None:
    assert type(exporter_for(Path("a/b.onnx"))) is EXPORTERS["onnx"]
    with pytest.raises(UsageError, match=r"Did you mean '\.onnx'"):
        exporter_for(Path("model.onx"))
    with pytest.raises(UsageError, match="no suffix"):
        exporter_for(Path("model"))


def test_packed_weights_are_written_as_floats_and_it_says_so(tmp_path: Path) -> None:
    case = CASES["residual"]
    model = compressed(case.model(), METHODS["weight_only"]())
    artifact = export(model, tmp_path / "model.onnx", case.data(3, 2))
    assert any("8 packed weights are written as the floats" in note for note in artifact.notes)
    np.testing.assert_allclose(run(artifact, case.batch(4)), model.predict(case.batch(4)).numpy(), rtol=1e-4, atol=1e-5)

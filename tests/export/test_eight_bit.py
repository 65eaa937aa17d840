"""An 8-bit ONNX file is the float one rounded, node for node; injected faults are refused with the layer named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import layerwise as lw
from layerwise.artifact import export
from layerwise.data import Batch, Data
from layerwise.errors import ExportMismatch, LayerwiseError, UsageError, UserModelError
from layerwise.export import _eight_bit
from layerwise.export import onnx as exporter
from layerwise.export._inputs import Inputs
from layerwise.export._parity import session
from layerwise.export._quantize import Choice, choose
from layerwise.method import METHODS, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.onnx_nodes import onnx_nodes
from layerwise.plan import CompressionPlan, Step
from tests.models import CASES


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class ConvNet(nn.Module):
    """A stem, three residual blocks and a head; the normalization has seen data."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 5)
        with torch.no_grad():
            for _ in range(3):
                self(torch.randn(8, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def convnet(seed: int = 0) -> UniversalModel:
    torch.manual_seed(seed)
    return UniversalModel(ConvNet().eval(), example=Batch((torch.randn(2, 3, 8, 8),)))


def pixels(*sizes: int, seed: int = 1) -> Data:
    g = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 5, (n,), generator=g)) for n in sizes]
    return Data.of(batches)


@dataclass(frozen=True)
class Made:
    """One 8-bit file with all that proving it takes; each fault works on a copy."""

    model: UniversalModel
    folder: Path
    reference: Path
    choice: Choice
    inputs: Inputs
    rounded: _eight_bit.Rounded
    batches: list[Batch]
    places: dict[str, str]

    def prove(self, fault: Callable[[Path], None], tmp_path: Path) -> _eight_bit.Proved:
        copy = Path(shutil.copytree(self.folder, tmp_path / "made"))
        fault(copy / "model.onnx")
        reference = copy / self.reference.name
        return _eight_bit.prove(
            self.model, reference, copy / "model.onnx", self.choice, self.inputs, self.rounded, self.batches, self.places
        )


def made(model: UniversalModel, data: Data, mode: str, folder: Path, keep: str = "") -> Made:
    """What the exporter does up to the proof."""
    model.see(data[0])
    batches = list(data)
    program, inputs = exporter.exported(model, batches)
    places = exporter.layer_outputs(program.model, [layer.name for layer in model.layers])
    exporter.name_nodes(program.model, dict(model.module.named_modules()))
    exporter.save(program, folder / "float-model.onnx", 1)
    rounded = _eight_bit.Rounded(mode, keep, data, data)
    reference, choice = _eight_bit.make(folder / "float-model.onnx", folder / "model.onnx", inputs, rounded)
    return Made(model, folder, reference, choice, inputs, rounded, batches, places)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(convnet(), pixels(8, 5), "static", tmp_path_factory.mktemp("static"), keep="stem")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Made:
    case = CASES["residual"]
    return made(case.model(), case.data(8, 5), "dynamic", tmp_path_factory.mktemp("dynamic"), keep=r"blocks\.0")


def change(edit: Callable[[onnx.GraphProto], None]) -> Callable[[Path], None]:
    def fault(path: Path) -> None:
        model = onnx.load(path)
        edit(model.graph)
        onnx.save(model, path)

    return fault


def tensor(graph: onnx.GraphProto, name: str) -> TensorProto:
    (found,) = [i for i in graph.initializer if i.name == name]
    return found


def write(graph: onnx.GraphProto, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    found = tensor(graph, name)
    found.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(found).copy()), name))


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (found,) = [n for n in graph.node if n.name == name]
    return found


def bump(array: np.ndarray) -> np.ndarray:
    array.flat[3] += 1 if array.flat[3] < 100 else -1
    return array


CONV = "model.blocks.1.conv2.weight"


def corrupted_weight(graph: onnx.GraphProto) -> None:
    write(graph, f"{CONV}_quantized", bump)


def swapped_weights(graph: onnx.GraphProto) -> None:
    one, two = node(graph, f"{CONV}_DequantizeLinear"), node(graph, "model.blocks.2.conv2.weight_DequantizeLinear")
    one.output[0], two.output[0] = two.output[0], one.output[0]


def wrong_scale_of_a_weight(graph: onnx.GraphProto) -> None:
    write(graph, f"{CONV}_scale", lambda a: a * np.where(np.arange(len(a)) == 2, 1.02, 1).astype(np.float32))


def wrong_zero_point_of_a_weight(graph: onnx.GraphProto) -> None:
    write(graph, f"{CONV}_zero_point", lambda a: a + (np.arange(len(a)) == 1).astype(np.int8))


def wrong_bias(graph: onnx.GraphProto) -> None:
    write(graph, f"{CONV}_bias_quantized", bump)


def wrong_scale_of_an_activation(graph: onnx.GraphProto) -> None:
    scale = node(graph, "blocks.1/Add").input[1].replace("_DequantizeLinear_Output", "_scale")
    write(graph, scale, lambda a: a * np.float32(1.001))


def wrong_zero_point_of_an_activation(graph: onnx.GraphProto) -> None:
    zero = node(graph, "blocks.1/Add").input[1].replace("_DequantizeLinear_Output", "_zero_point")
    write(graph, zero, lambda a: a + np.uint8(1))


def read_back_on_another_grid(graph: onnx.GraphProto) -> None:
    reader = node(graph, node(graph, "blocks.1/Add").input[1].replace("_Output", ""))
    reader.input[1] = next(i.name for i in graph.initializer if i.name == "x_scale" or i.name.endswith("relu_scale"))


def rewired(graph: onnx.GraphProto) -> None:
    """The second convolution of a block reads the block's input: same shape, same grid of numbers, another net."""
    node(graph, "blocks.1.conv2/Conv").input[0] = node(graph, "blocks.1.conv1/Conv").input[0]


def other_tensor_left_float(graph: onnx.GraphProto) -> None:
    write(graph, "model.stem.weight", lambda a: a * np.float32(1 + 1e-6))


def chosen_node_left_float(graph: onnx.GraphProto) -> None:
    back = node(graph, f"{CONV}_DequantizeLinear")
    values = numpy_helper.to_array(tensor(graph, back.input[0])).astype(np.float32)
    scale = numpy_helper.to_array(tensor(graph, back.input[1])).reshape(-1, 1, 1, 1)
    graph.initializer.append(numpy_helper.from_array(values * scale, back.output[0]))
    graph.node.remove(back)


def operator_changed(graph: onnx.GraphProto) -> None:
    node(graph, "blocks.2/Add").op_type = "Mul"


STATIC_FAULTS: list[tuple[Callable[[onnx.GraphProto], None], str, str]] = [
    (corrupted_weight, "blocks.1.conv2", "steps of its 8-bit grid"),
    (swapped_weights, "blocks.1.conv2", "steps of its 8-bit grid"),
    (wrong_scale_of_a_weight, "blocks.1.conv2", "steps of its 8-bit grid"),
    (wrong_zero_point_of_a_weight, "blocks.1.conv2", "steps of its 8-bit grid"),
    (wrong_bias, "blocks.1.conv2", "bias is"),
    (wrong_scale_of_an_activation, "blocks.1", "the calibration data gives"),
    (wrong_zero_point_of_an_activation, "blocks.1", "the calibration data gives"),
    (read_back_on_another_grid, "blocks.1", "read back on another grid"),
    (rewired, "blocks.1", "first layer that diverges is blocks.1"),
    (other_tensor_left_float, "stem", "another tensor than in the float graph"),
    (chosen_node_left_float, "blocks.1.conv2", "was chosen and is not 8-bit"),
    (operator_changed, "blocks.2", "became Mul"),
]


@pytest.mark.parametrize(("fault", "place", "said"), STATIC_FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_faults_in_a_static_file(
    fault: Callable[[onnx.GraphProto], None], place: str, said: str, static: Made, tmp_path: Path
) -> None:
    with pytest.raises(ExportMismatch) as caught:
        static.prove(change(fault), tmp_path)
    assert caught.value.place.startswith(place)
    assert said in caught.value.what
    assert caught.value.code == "LW-V21"


def dynamic_weight(graph: onnx.GraphProto) -> None:
    write(graph, node(graph, "blocks.2.up/MatMul_quant").input[1], bump)


def dynamic_scale(graph: onnx.GraphProto) -> None:
    write(graph, node(graph, "blocks.2.up/MatMul_quant_scales_mul").input[1], lambda a: a * np.float32(1.02))


def dynamic_zero_point(graph: onnx.GraphProto) -> None:
    write(graph, node(graph, "blocks.2.up/MatMul_quant").input[3], lambda a: a + np.int8(1))


def zero_point_of_another_activation(graph: onnx.GraphProto) -> None:
    node(graph, "blocks.2.up/MatMul_quant").input[2] = node(graph, "blocks.1.up/MatMul_quant").input[2]


@pytest.mark.parametrize("fault", [dynamic_weight, dynamic_scale, dynamic_zero_point, zero_point_of_another_activation])
def test_faults_in_a_dynamic_file(fault: Callable[[onnx.GraphProto], None], dynamic: Made, tmp_path: Path) -> None:
    with pytest.raises(ExportMismatch, match="steps of its 8-bit grid") as caught:
        dynamic.prove(change(fault), tmp_path)
    assert caught.value.place == "blocks.2.up"


def test_a_dynamic_product_read_elsewhere_is_the_first_diverging_layer(dynamic: Made, tmp_path: Path) -> None:
    def rewire(graph: onnx.GraphProto) -> None:
        node(graph, "blocks.3/Add").input[0] = node(graph, "blocks.1/Add").output[0]

    with pytest.raises(ExportMismatch) as caught:
        dynamic.prove(change(rewire), tmp_path)
    assert caught.value.place == "blocks.3"


@pytest.mark.parametrize("which", ["static", "dynamic"])
def test_a_node_that_was_to_stay_float_and_is_8_bit(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    right: Made = request.getfixturevalue(which)

    def anew(path: Path) -> None:
        everything = Choice(right.choice.mode, (*right.choice.nodes, *right.choice.kept), {}, right.choice.convolutional)
        _eight_bit.quantized(path.with_name(right.reference.name), path, everything, right.inputs, right.rounded.calibration)

    with pytest.raises(ExportMismatch, match="was to stay float") as caught:
        right.prove(anew, tmp_path)
    assert caught.value.place == ("stem" if which == "static" else "blocks.0.up")


def test_the_file_of_another_model(static: Made, tmp_path: Path) -> None:
    def replaced(seed: int) -> Callable[[Path], None]:
        def fault(path: Path) -> None:
            folder = tmp_path / f"other{seed}"
            folder.mkdir()
            other = made(convnet(seed), pixels(8, 5), "static", folder, keep="stem")
            shutil.copy(other.folder / "model.onnx", path)

        return fault

    with pytest.raises(ExportMismatch) as caught:  # the same class, other weights
        static.prove(replaced(7), tmp_path)
    assert caught.value.place.startswith(("stem", "blocks.0"))


def test_the_file_of_another_class(static: Made, dynamic: Made, tmp_path: Path) -> None:
    with pytest.raises(ExportMismatch, match="not the file that was made of this model"):
        static.prove(lambda path: shutil.copy(dynamic.folder / "model.onnx", path) and None, tmp_path)


def test_external_weights_that_are_gone_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = exporter.save

    def save(program: Any, path: Path, size: int) -> None:
        original(program, path, size)
        path.with_name(f"{path.name}.data").unlink()

    monkeypatch.setattr(exporter, "ONE_FILE", 100)
    monkeypatch.setattr(exporter, "save", save)
    with pytest.raises(ExportMismatch, match=r"model\.onnx\.data, which is not there") as caught:
        export(CASES["residual"].model(), tmp_path / "model.onnx", CASES["residual"].data(4))
    assert caught.value.place == "blocks.0.up.weight"
    assert list(tmp_path.iterdir()) == []


def test_a_fault_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = _eight_bit.quantized

    def spoiled(reference: Path, path: Path, *rest: Any) -> None:
        original(reference, path, *rest)
        change(corrupted_weight)(path)

    monkeypatch.setattr(_eight_bit, "quantized", spoiled)
    with pytest.raises(ExportMismatch):
        export(convnet(), tmp_path / "model.onnx", pixels(6), settings={"quantize": "static"})
    assert list(tmp_path.iterdir()) == []


def test_the_artifact_says_what_was_done_and_measured(tmp_path: Path) -> None:
    model, data = convnet(), pixels(8, 5)
    fingerprint = model.fingerprint
    artifact = lw.export(model, tmp_path / "a.onnx", data, quantize="auto", keep=r"blocks\.2", calibration=pixels(9, seed=3))
    figures = artifact.figures
    assert model.fingerprint == fingerprint
    assert figures["quantize"] == "static"
    assert set(figures["kept"]) == {"blocks.2.conv1/Conv", "blocks.2.conv2/Conv"}
    assert figures["calibration"] == {"data": "batches", "samples": 9}
    assert figures["proof"]["weight_steps"] <= 0.501
    assert figures["proof"]["without_rounding"] <= 1e-5
    assert 0 < artifact.parity.relative <= artifact.parity.bound
    for kind in ("float32", "int8"):
        assert figures[kind]["samples"] == 13
        assert figures[kind]["latency"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    found = np.concatenate([session(artifact.path).run(None, {"x": b.args[0].numpy()})[0] for b in data])
    labels = np.concatenate([b.labels for b in data])
    assert figures["int8"]["metrics"]["accuracy"] == pytest.approx(float((found.argmax(1) == labels).mean()))
    assert "watched on" not in " ".join(artifact.notes)
    assert artifact.to_dict()["figures"]["int8"]["bytes"] == artifact.bytes


def test_a_static_file_computes_the_rounded_net_in_float64(tmp_path: Path) -> None:
    """A replica of a few lines: every tensor on its grid of 256 values, weights per row, sums exact."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 6)
    x = torch.randn(64, 16)
    artifact = export(UniversalModel(layer.eval()), tmp_path / "a.onnx", Data.of([x]), settings={"quantize": "static"})

    def on_grid(values: np.ndarray, scale: Any, zero: Any, low: int, high: int) -> np.ndarray:
        return (np.clip(np.round(values / scale) + zero, low, high) - zero) * scale

    def fixed(values: np.ndarray) -> tuple[float, float]:
        scale = (max(values.max(), 0) - min(values.min(), 0)) / 255
        return scale, np.round(-min(values.min(), 0) / scale)

    weight, bias, inputs = (t.detach().numpy().astype(np.float64) for t in (layer.weight, layer.bias, x))
    steps = np.abs(weight).max(1, keepdims=True) / 127
    scale, zero = fixed(inputs)
    exact = on_grid(inputs, scale, zero, 0, 255) @ on_grid(weight, steps, 0, -127, 127).T
    exact += on_grid(bias, scale * steps[:, 0], 0, -(2**31), 2**31 - 1)
    wanted = on_grid(exact, *fixed(inputs @ weight.T + bias), 0, 255)
    (found,) = session(artifact.path).run(None, {"input": x.numpy()})
    step = fixed(inputs @ weight.T + bias)[0]
    off = np.abs(found - wanted) / step
    assert off.max() < 1.01  # where a sum lies between two steps, either may be taken
    assert (off > 0.01).mean() < 0.01


class Attention(nn.Module):
    """One head over many tokens."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.head(self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]).mean(1))


def test_attention_stays_float_in_a_static_file(tmp_path: Path) -> None:
    """onnxruntime would make integers of it, and its QLinearSoftmax loses small weights."""
    torch.manual_seed(0)
    model = UniversalModel(Attention().eval())
    data = Data.of([torch.randn(4, 197, 16) + 1 for _ in range(2)])
    artifact = export(model, tmp_path / "a.onnx", data, settings={"quantize": "static"})
    assert len(artifact.figures["nodes"]) == 3
    graph = onnx.load(artifact.path).graph
    integers = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    products = [n for n in graph.node if n.op_type == "MatMul" and not {*n.input} <= integers]
    assert len(products) == 2


def test_auto_follows_what_holds_the_weights(static: Made) -> None:
    assert choose(ir.load(static.reference).graph, "auto", "").mode == "static"
    case = CASES["vit"]
    model = case.model()
    program, _ = exporter.exported(model, [case.batch(3)])
    exporter.name_nodes(program.model, dict(model.module.named_modules()))
    choice = choose(program.model.graph, "auto", "")
    assert choice.mode == "dynamic"
    assert list(choice.kept) == ["patch_embed.proj/Conv"]
    assert "blocks.0.attn.qkv/MatMul" in choice.nodes
    assert not any("attn/MatMul" in name for name in choice.nodes)  # queries by keys: no weight


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"quantize": "statik"}, UsageError, "Did you mean 'static'"),
        ({"quantise": "auto"}, UsageError, "Did you mean 'quantize'"),
        ({"keep": "stem"}, UsageError, "only with quantize"),
        ({"quantize": "auto", "keep": "stem("}, UsageError, "no regular expression"),
    ],
)
def test_wrong_settings(settings: dict[str, str], error: type[LayerwiseError], said: str, tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        export(CASES["residual"].model(), tmp_path / "a.onnx", CASES["residual"].data(4), settings=settings)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keep", "error", "said"),
    [("stemm", UsageError, "There are stem, blocks.0.up"), (".", UserModelError, "No node is left to quantize: named to stay")],
)
def test_what_to_keep_must_leave_something(keep: str, error: type[LayerwiseError], said: str, dynamic: Made) -> None:
    with pytest.raises(error) as caught:
        choose(ir.load(dynamic.reference).graph, "auto", keep)
    assert said in str(caught.value)


def test_only_float32_models(tmp_path: Path) -> None:
    step = step_of(METHODS["half_precision"](dtype="bfloat16"), [])  # type: ignore[call-arg]  # each method has its own
    model = apply_plan(CASES["residual"].model(), CompressionPlan((step,))).model
    with pytest.raises(UsageError, match="are bfloat16"):
        export(model, tmp_path / "a.onnx", CASES["residual"].data(4), settings={"quantize": "auto"})


def test_a_plan_becomes_a_list_of_nodes(dynamic: Made) -> None:
    path = dynamic.folder / "float-model.onnx"
    plan = CompressionPlan((step_of(METHODS["int8_dynamic"](), ["blocks.1"]), Step("x", ("blocks.3.up",), {"bits": 4})))
    nodes = onnx_nodes(plan, path)
    assert nodes.bits == {"blocks.1.up/Gemm": 8, "blocks.1.down/Gemm": 8, "blocks.3.up/Gemm": 4}
    assert nodes.quantize == tuple(nodes.bits)
    assert set(nodes.exclude) == {f"{m}/Gemm" for m in ("stem", "head", "blocks.3.down")} | {
        f"blocks.{i}.{part}/Gemm" for i in (0, 2) for part in ("up", "down")
    }
    assert onnx_nodes({"blocks": 16, "blocks.2.up": 8}, path).quantize == ("blocks.2.up/Gemm",)
    assert choose(ir.load(path).graph, "static", nodes.keep).nodes == nodes.quantize
    mixed = Step("mixed_precision", ("blocks.0",), {"bits": 3.5, "chosen": {"blocks.0.up.weight": 3, "blocks.0.down.weight": 4}})
    assert onnx_nodes(CompressionPlan((mixed,)), path).bits == {"blocks.0.up/Gemm": 3, "blocks.0.down/Gemm": 4}
    with pytest.raises(UsageError, match=r"No node of this file belongs to blocks\.7"):
        onnx_nodes({"blocks.7": 8}, path)


def test_a_file_of_another_exporter_has_no_names_to_choose_by(dynamic: Made, tmp_path: Path) -> None:
    model = onnx.load(dynamic.folder / "float-model.onnx")
    for position, each in enumerate(model.graph.node):
        each.name = f"node{position}"
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UsageError, match="not named after modules"):
        onnx_nodes({"blocks": 8}, tmp_path / "foreign.onnx")

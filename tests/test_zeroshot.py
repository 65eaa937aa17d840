"""Scores from a file of weights are those from the model, and only one tensor is in memory meanwhile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import layerwise as lw
from layerwise.analyzer import ANALYZERS
from layerwise.cli import main
from layerwise.errors import ModelError, NonFiniteWeights, UsageError
from layerwise.scores import Status
from layerwise.weights.grouping import is_parameter, layers_of
from layerwise.zeroshot import WeightAnalyzer
from tests.conftest import ROOT
from tests.models import CASES

FAMILIES = [
    "bert",
    "gpt2",
    "llama",
    "vit",
    "resnet",
    "convnext",
    "mobilenet",
    "t5",
    "albert",
    "sequential",
    "residual",
    "encoder",
]
METHODS = [name for name in sorted(ANALYZERS) if issubclass(ANALYZERS[name], WeightAnalyzer)]


def saved(state: dict[str, Tensor], folder: Path, shards: int = 1) -> Path:
    """The tensors in a folder, with an index when there are several shards; tied ones are written out."""
    folder.mkdir(exist_ok=True)
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(plain, folder / "model.safetensors")
        return folder
    placed = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(plain)}
    for file in set(placed.values()):
        save_file({name: tensor for name, tensor in plain.items() if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


BESIDE = {"mobilenet": {"blocks.5", "conv_head"}}  # layers that are no blocks: only a run tells that they are no head


def same(left: lw.Scores, right: lw.Scores, beside: Iterable[str] = ()) -> bool:
    return {n: str(e) for n, e in left.entries.items()} == {n: str(e) for n, e in right.entries.items() if n not in beside}


def test_the_methods_that_read_weights_only_are_those_that_can_read_a_file() -> None:
    assert {"spectral_analysis", "neural_persistence", "quantization_error", "weight_norm"} <= set(METHODS)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_from_the_file_are_those_from_the_model(family: str, tmp_path: Path) -> None:
    model = CASES[family].model()
    folder = saved(model.module.state_dict(), tmp_path, shards=3 if family in {"bert", "resnet"} else 1)
    report, beside = lw.analyze(f"weights:{folder}", methods="all"), BESIDE.get(family, set())
    assert report.methods == METHODS
    for name in METHODS:
        assert same(report[name], ANALYZERS[name]().analyze(model), beside), name
    assert {x.name: x.parameters for x in report.layers} == {x.name: x.parameters for x in model.layers if x.name not in beside}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_what_transformers_saves_is_read_the_same(family: str, tmp_path: Path) -> None:
    model = CASES[family].model()
    model.module.save_pretrained(tmp_path)
    report = lw.analyze(f"weights:{tmp_path}", methods="weight_norm")
    assert same(report["weight_norm"], ANALYZERS["weight_norm"]().analyze(model))


def test_half_precision_is_scored_as_it_is_stored(tmp_path: Path) -> None:
    model = CASES["llama"].model()
    model.module.bfloat16()
    report = lw.analyze(f"weights:{saved(model.module.state_dict(), tmp_path)}", methods="all")
    for name in METHODS:
        assert same(report[name], ANALYZERS[name]().analyze(model)), name


def test_what_is_no_layer_is_named(tmp_path: Path) -> None:
    report = lw.analyze(f"weights:{saved(CASES['resnet'].model().module.state_dict(), tmp_path)}", methods="weight_norm")
    notes = " ".join(report.notes)
    assert "'conv1.weight'" in notes
    assert "'fc.weight'" in notes
    assert "num_batches_tracked" in notes


def shaped(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (4, 4))


def test_experts_are_no_layers() -> None:
    block = ["attn.q", "attn.o", *(f"mlp.experts.{e}.{w}" for e in range(3) for w in ("up", "down"))]
    names = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in block]
    assert list(layers_of(shaped(*names))) == ["model.layers.0", "model.layers.1"]


def test_unlike_parts_inside_a_block_do_not_open_it() -> None:
    parts = ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o", "layer.1.Dense.wi", "layer.1.Dense.wo")
    names = [f"encoder.block.{i}.{part}.weight" for i in range(2) for part in parts]
    assert list(layers_of(shaped(*names))) == ["encoder.block.0", "encoder.block.1"]


def test_layers_come_in_the_order_of_their_numbers() -> None:
    names = [f"h.{i}.{part}.weight" for i in (10, 9, 0) for part in ("a", "b")]
    assert list(layers_of(shaped(*names))) == ["h.0", "h.9", "h.10"]


def test_buffers_are_no_parameters() -> None:
    assert is_parameter("h.0.attn.bias", torch.zeros(3))
    assert not is_parameter("h.0.attn.bias", torch.zeros(1, 1, 4, 4))
    assert not is_parameter("layer1.0.bn1.running_var", torch.zeros(3))
    assert not is_parameter("layer1.0.qweight", torch.zeros(3, dtype=torch.int32))


def test_methods_that_need_a_model_are_refused(tmp_path: Path) -> None:
    folder = saved(CASES["residual"].model().module.state_dict(), tmp_path)
    with pytest.raises(UsageError, match="layer_ablation need a model"):
        lw.analyze(f"weights:{folder}", methods=["weight_norm", "layer_ablation"])
    with pytest.raises(UsageError, match="no class to run data"):
        lw.analyze(f"weights:{folder}", CASES["residual"].data())
    with pytest.raises(UsageError, match="blocks only"):
        lw.analyze(f"weights:{folder}", methods="weight_norm", granularity="channel")


def test_names_without_a_layer_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No layers") as caught:
        lw.analyze(f"weights:{saved({'scale': torch.ones(3)}, tmp_path)}")
    assert caught.value.code == "LW-M20"


def test_a_weight_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in CASES["residual"].model().module.state_dict().items()}
    state["blocks.1.up.weight"][0, 0] = torch.nan
    with pytest.raises(NonFiniteWeights, match=re.escape("blocks.1.up.weight")):
        lw.analyze(f"weights:{saved(state, tmp_path)}")


def test_a_file_of_torch_is_read_too(tmp_path: Path) -> None:
    model = CASES["residual"].model()
    torch.save(model.module.state_dict(), tmp_path / "model.pt")
    report = lw.analyze(f"weights:{tmp_path / 'model.pt'}", methods="weight_norm")
    assert same(report["weight_norm"], ANALYZERS["weight_norm"]().analyze(model))


def test_the_command_line_takes_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(CASES["bert"].model().module.state_dict(), tmp_path / "model")
    out = tmp_path / "report.json"
    assert main(["analyze", f"weights:{folder}", "--methods", "weight_norm,quantization_error", "--out", str(out)]) == 0
    assert "bert.encoder.layer.2" in capsys.readouterr().out
    assert lw.ImportanceReport.load(out).methods == ["weight_norm", "quantization_error"]
    assert "html" in lw.ImportanceReport.load(out).to_html()
    assert main(["analyze", f"weights:{tmp_path / 'nowhere'}"]) == 2
    assert "LW-C04" in capsys.readouterr().err


PEAK = """
import re, sys
import layerwise as lw
from layerwise.engine import ZERO_SHOT
lw.analyze("weights:" + sys.argv[1], methods=ZERO_SHOT)  # all that is loaded on first use is loaded
def now(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = now("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here: that of the imports would hide ours
lw.analyze("weights:" + sys.argv[2], methods=ZERO_SHOT)
print(now("VmHWM") - before)
"""


def test_memory_grows_with_the_largest_tensor_not_with_the_file(tmp_path: Path) -> None:
    """Fails when a tensor is copied whole to float64 (+128 MiB), when the pages of the file stay mapped (+200 MiB), or when a
    tensor is held while the next one is read (+64 MiB)."""
    largest = 64 * 2**20
    big = {f"blocks.{i}.{w}.weight": torch.randn(128, largest // 512).div(9).to(t) for i, w, t in sizes()}
    small = {f"blocks.{i}.{w}.weight": torch.randn(64, 96) for i in range(2) for w in "ab"}
    files = [str(saved(state, tmp_path / name, shards=2)) for name, state in (("small", small), ("big", big))]
    total = sum(tensor.nbytes for tensor in big.values())
    del big
    environment: dict[str, Any] = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", PEAK, *files], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout) * 1024
    assert total > 190 * 2**20
    assert grown < 1.3 * largest + 120 * 2**20  # blocks of float64, and what the allocator keeps of them


def sizes() -> list[tuple[int, str, torch.dtype]]:
    return [(0, "a", torch.float32), (0, "b", torch.float16), (1, "a", torch.float32), (1, "b", torch.bfloat16)]


def test_a_layer_without_a_matrix_says_so() -> None:
    for name in ("neural_persistence", "quantization_error", "spectral_analysis"):
        analyzer: Any = ANALYZERS[name]()
        assert analyzer.combine([analyzer.summarize(torch.ones(3))]).status is Status.NOT_APPLICABLE

"""A saved model comes back bit for bit, and a folder that was touched does not come back at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from layerwise.compress.drop_layers import DropLayers
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.int8_dynamic import Int8Dynamic
from layerwise.compress.low_rank import LowRank
from layerwise.compress.magnitude_pruning import MagnitudePruning
from layerwise.data import Batch
from layerwise.errors import CorruptRun, LayerwiseError, ModelFormatError, UsageError
from layerwise.files import write_manifest
from layerwise.measure import compare
from layerwise.method import apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.result import CompressionResult
from layerwise.saved import load_saved, save_model
from layerwise.source import Source
from layerwise.task import Classification, Fidelity
from tests.models import CASES, ResidualNet

SOURCE = Source("py", "tests.models:ResidualNet", {"depth": 4})
MIXED = CompressionPlan(
    (
        step_of(DropLayers(), ["blocks.1"]),
        step_of(MagnitudePruning(0.3), ["blocks.0"]),
        step_of(HalfPrecision("bfloat16"), ()),
        step_of(Int8Dynamic(), ["blocks.2", "blocks.3"]),
    )
)


def residual(task: Any = None) -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(ResidualNet().eval(), source=SOURCE, task=task, name="net", example=CASES["residual"].batch(2))


def test_every_kind_of_step_at_once(tmp_path: Path) -> None:
    model = apply_plan(residual(Fidelity("cosine")), MIXED).model
    save_model(model, tmp_path / "saved")
    again = load_saved(tmp_path / "saved")
    batch = CASES["residual"].batch(5)
    assert torch.equal(again.predict(batch), model.predict(batch))
    assert again.fingerprint == model.fingerprint
    assert again.task == Fidelity("cosine")
    assert (again.name, again.source) == ("net", model.source)
    assert [layer.name for layer in again.layers] == ["blocks.0", "blocks.2", "blocks.3"]


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    model = apply_plan(residual(), MIXED).model
    save_model(model, tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {"layerwise.json", "weights.safetensors", "manifest.json"}
    with safe_open(tmp_path / "saved" / "weights.safetensors", "pt") as file:
        assert {"blocks.2.up.weight.qdata", "blocks.2.up.weight.scale", "blocks.0.up.weight"} <= set(file.keys())
        assert not any(key.startswith("blocks.1.") for key in file.keys())  # noqa: SIM118  # no mapping
    about = json.loads((tmp_path / "saved" / "layerwise.json").read_text())
    assert (about["format"], about["modality"], about["source"]["kind"]) == (1, "other", "compressed")
    assert about["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_twice_compressed_is_one_history(tmp_path: Path) -> None:
    once = apply_plan(residual(), CompressionPlan((step_of(DropLayers(), ["blocks.1"]),))).model
    save_model(once, tmp_path / "once")
    twice = apply_plan(load_saved(tmp_path / "once"), CompressionPlan((step_of(DropLayers(), ["blocks.2"]),))).model
    save_model(twice, tmp_path / "twice")
    again = load_saved(tmp_path / "twice")
    assert torch.equal(again.predict(CASES["residual"].batch(3)), twice.predict(CASES["residual"].batch(3)))
    assert [layer.name for layer in again.layers] == ["blocks.0", "blocks.3"]


def test_the_source_can_be_built_like_any_other(tmp_path: Path) -> None:
    from layerwise.source import SOURCES, build

    model = apply_plan(residual(), MIXED).model
    assert model.source is not None
    built = build(model.source)
    assert {n: t.shape for n, t in built.state_dict().items()} == {n: t.shape for n, t in model.module.state_dict().items()}
    save_model(model, tmp_path / "saved")
    opened = SOURCES["compressed"]().open(str(tmp_path / "saved"), weights=None)
    assert torch.equal(opened.module(CASES["residual"].batch(3).args[0]), model.predict(CASES["residual"].batch(3)))


def test_a_result_saves_its_figures_and_proofs(tmp_path: Path) -> None:
    original = residual(Classification())
    applied = apply_plan(original, MIXED)
    before, after = compare(original, applied.model, CASES["residual"].data(), latency_batches=3)
    result = CompressionResult(applied.model, applied.plan, before, after, ())
    result.save(tmp_path / "saved")
    about = json.loads((tmp_path / "saved" / "layerwise.json").read_text())
    assert CompressionPlan.from_dict(about["result"]["plan"]) == applied.plan
    assert about["result"]["after"]["size"] == after.size
    assert load_saved(tmp_path / "saved").task == Classification()


def test_hugging_face_reads_what_it_can_read(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    case = CASES["llama"]
    model = case.model()
    names = [layer.name for layer in model.layers]
    pruned = apply_plan(model, CompressionPlan((step_of(MagnitudePruning(), names),))).model
    save_model(pruned, tmp_path / "pruned")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(theirs(**case.batch(3).kwargs).logits, pruned.predict(case.batch(3)))

    thin = apply_plan(model, CompressionPlan((step_of(LowRank(), names[:1]),))).model
    save_model(thin, tmp_path / "thin")
    with pytest.raises(OSError, match=r"config\.json|no file named"):  # better than a first layer of noise
        LlamaForCausalLM.from_pretrained(tmp_path / "thin")
    again = load_saved(tmp_path / "thin", module=case.build())
    assert torch.equal(again.predict(case.batch(3)), thin.predict(case.batch(3)))


def test_a_plain_object_needs_its_class(tmp_path: Path) -> None:
    model = apply_plan(CASES["residual"].model(), MIXED).model
    save_model(model, tmp_path / "saved")
    with pytest.raises(UsageError, match="module=") as caught:
        load_saved(tmp_path / "saved")
    assert str(tmp_path / "saved") in str(caught.value)
    other = ResidualNet()
    weights = {n: p.clone() for n, p in other.state_dict().items()}
    load_saved(tmp_path / "saved", module=other)
    assert all(torch.equal(p, weights[n]) for n, p in other.state_dict().items())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit of the weights": (lambda f: flip(f / "weights.safetensors"), "changed weights.safetensors"),
    "cut weights": (lambda f: (f / "weights.safetensors").write_bytes(b"short"), "changed weights.safetensors"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "missing weights.safetensors"),
    "another description": (lambda f: (f / "layerwise.json").write_text("{}"), "changed layerwise.json"),
    "a new file": (lambda f: (f / "tokenizer.json").write_text("{}"), "unexpected tokenizer.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text("{"), "not readable JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_touched_folder_is_refused(fault: str, tmp_path: Path) -> None:
    save_model(apply_plan(residual(), MIXED).model, tmp_path / "saved")
    load_saved(tmp_path / "saved")
    change, words = FAULTS[fault]
    change(tmp_path / "saved")
    with pytest.raises(CorruptRun, match=words) as caught:
        load_saved(tmp_path / "saved")
    assert caught.value.code == "LW-R11"


def rewritten(folder: Path, **changes: Any) -> None:
    """As if it had been written so: the manifest fits."""
    about = json.loads((folder / "layerwise.json").read_text())
    (folder / "layerwise.json").write_text(json.dumps(about | changes))
    write_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 99}, "format 99"),
        ({"source": Source("py", "tests.models:ResidualNet", {"depth": 6}).to_dict()}, "lacks"),
        ({"source": Source("py", "tests.models:ResidualNet", {"depth": 2}).to_dict()}, "does not have"),
        ({"source": Source("py", "tests.models:ResidualNet", {"width": 16}).to_dict()}, "another shape"),
        ({"source": Source("timn", "x", {}).to_dict()}, "Did you mean 'timm'"),
        ({"source": Source("py", "tests.models:RezidualNet", {}).to_dict()}, "ResidualNet"),
    ],
)
def test_what_cannot_be_built_says_why(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_model(residual(), tmp_path / "saved")
    rewritten(tmp_path / "saved", **changes)
    with pytest.raises(LayerwiseError, match=words) as caught:
        load_saved(tmp_path / "saved")
    assert not isinstance(caught.value, CorruptRun)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        load_saved(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    write_manifest(tmp_path / "other")
    with pytest.raises(ModelFormatError, match=r"layerwise\.json"):
        load_saved(tmp_path / "other")


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    save_model(residual(), tmp_path / "saved")
    with pytest.raises(UsageError) as caught:
        save_model(residual(), tmp_path / "saved")
    assert caught.value.code == "LW-C07"
    save_model(apply_plan(residual(), MIXED).model, tmp_path / "saved", force=True)
    assert load_saved(tmp_path / "saved").source != SOURCE


def test_no_sample_of_the_user_is_saved(tmp_path: Path) -> None:
    secret = 0.123456789
    model = UniversalModel(ResidualNet().eval(), source=SOURCE, example=Batch((torch.full((2, 8), secret),)))
    save_model(model, tmp_path / "saved")
    assert "0.1234" not in (tmp_path / "saved" / "layerwise.json").read_text()
    assert load_saved(tmp_path / "saved").example.args[0].shape == (2, 8)


def test_a_buffer_that_is_infinite_comes_back(tmp_path: Path) -> None:
    model = residual()
    model.module.register_buffer("bound", torch.tensor(torch.inf))  # no bound at all, as clamped quantizers have it
    save_model(model, tmp_path / "saved")
    again = load_saved(tmp_path / "saved", module=model.module)
    assert again.module.get_buffer("bound") == torch.inf

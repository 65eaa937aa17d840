"""`load` and `load_data`: specs, errors for paths, limits, fingerprints."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.errors import UsageError
from layerwise.loading import available, load, load_data
from layerwise.model import UniversalModel
from layerwise.task import Classification, Fidelity, LanguageModelling
from layerwise.weights import save_weights

DIGITS = "timm:vit_tiny_patch16_224?img_size=8&patch_size=2&in_chans=1&embed_dim=16&depth=3&num_heads=2&num_classes=10"


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_module_is_wrapped_as_it_is() -> None:
    module = small()
    model = load(module, task="classification", example=torch.zeros(2, 4), name="mine")
    assert model.module is module
    assert (model.name, model.task, model.domain) == ("mine", Classification(), "other")
    assert len(model.layers) == 2
    assert load(model).module is module


def test_weights_for_a_module_fill_a_copy(tmp_path: Path) -> None:
    module, other = small(), small()
    save_weights(tmp_path / "w.safetensors", dict(other.state_dict()))
    before = module[0].weight.clone()
    model = load(module, weights=tmp_path / "w.safetensors")
    assert torch.equal(model.module[0].weight, other[0].weight)  # type: ignore[index]
    assert torch.equal(module[0].weight, before)


def test_a_spec_gives_the_same_model_each_time() -> None:
    state = torch.get_rng_state()
    one, two = load(DIGITS), load(DIGITS)
    assert one.fingerprint == two.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert one.notes == ("no weights were given: they are random, drawn with seed 0",)
    assert not one.module.training
    assert (one.name, one.domain, len(one.layers)) == ("vit_tiny_patch16_224", "vision", 3)
    assert one.clone().notes == one.notes


def test_tasks_by_name() -> None:
    assert load(DIGITS, task="fidelity").task == Fidelity("kl")
    assert load(DIGITS.replace("num_classes=10", "num_classes=0"), task="fidelity").task == Fidelity("cosine")
    assert load(DIGITS, task=LanguageModelling()).task == LanguageModelling()
    with pytest.raises(UsageError, match="Did you mean 'classification'"):
        load(DIGITS, task="clasification")


@pytest.mark.parametrize(
    ("spec", "code", "texts"),
    [
        ("resnet18", "LW-C", ["Unknown model 'resnet18'", "timm:NAME", "FILE.py:FACTORY"]),
        ("tim:resnet18", "LW-C", ["Did you mean 'timm'?"]),
        ("timm:resnet1888", "LW-C", ["timm has no model 'resnet1888'", "Did you mean 'resnet18"]),
        ("timm:resnet18?widht=3", "LW-C", ["cannot build 'resnet18'", "widht"]),
        ("./not/there", "LW-C04", ["There is no such folder", "/not/there"]),
        ("hf:./not/there", "LW-C04", ["There is no such folder", "/not/there"]),
        ("not/there.py:build", "LW-C04", ["There is no such file", "/not/there.py"]),
        ("hf:nobody/nothing-of-that-name", "LW-C04", ["nor in the local cache", "hf:DIR"]),
        ("py:json", "LW-C", ["names no factory", "py:package.module:factory"]),
        ("head:x", "LW-C", ["A head is fitted, not opened"]),
    ],
)
def test_bad_model_specs(spec: str, code: str, texts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load(spec)
    assert caught.value.code == code
    assert not [text for text in texts if text not in str(caught.value)], str(caught.value)


def test_paths_the_wrong_way_print_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("model.safetensors").write_bytes(b"")
    for spec in ("folder", "model.safetensors", "hf:model.safetensors", "hf:folder", "folder.py:x"):
        Path("folder.py").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=f"LW-C05 {tmp_path}/"):
            load(spec)
    with pytest.raises(UsageError, match=rf"LW-C04 {tmp_path}/rows\.csv: There is no such file"):
        load_data("rows.csv")
    with pytest.raises(UsageError, match=r"Unknown data 'sklaern:digits'.*Did you mean 'sklearn'.*FILE\.parquet"):
        load_data("sklaern:digits")
    with pytest.raises(UsageError, match=r"'\.safetensors' is not read as data"):
        load_data("model.safetensors")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *args: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "rows.csv").write_text("a\n1\n")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UsageError, match=r"LW-C06 .*rows\.csv: cannot be read: Permission denied"):
        load_data(tmp_path / "rows.csv")


def test_devices() -> None:
    assert available("cpu") == torch.device("cpu")
    assert load(small(), device="cpu").device.type == "cpu"
    for name in ("cuda:99", "tpu", "no device"):
        with pytest.raises(UsageError, match=r"LW-C10 .*Here: cpu"):
            load(small(), device=name)


def test_a_folder_saved_by_layerwise_is_opened_by_its_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "layerwise.json").write_text("{}")
    wanted = UniversalModel(small())
    reader = types.ModuleType("layerwise.saved")
    reader.load_saved = lambda folder: wanted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "layerwise.saved", reader)
    assert load(tmp_path) is wanted
    with pytest.raises(UsageError, match="holds its own weights"):
        load(tmp_path, weights="x.safetensors")


def csv(folder: Path, rows: int = 50) -> Path:
    path = folder / "rows.csv"
    path.write_text("a,b,label\n" + "".join(f"{i},{i * 2},{i * 3 // rows}\n" for i in range(rows)))
    return path


def test_a_limit_is_a_random_sample_that_repeats(tmp_path: Path) -> None:
    path = csv(tmp_path)
    one, two, other = (load_data(path, limit=20, seed=seed) for seed in (0, 0, 1))
    assert one.samples == 20
    assert torch.equal(one[0].args[0], two[0].args[0])
    assert not torch.equal(one[0].args[0], other[0].args[0])
    assert len(one[0].labels.unique()) == 3, "a sorted file's first rows would be of one class"
    assert one.notes == ("20 of 50 rows, drawn at random",)
    first = load_data(path, limit=20, seed=None)
    assert first[0].args[0][:, 0].tolist() == list(range(20))
    assert load_data(path, limit=500).notes == ()


def test_the_fingerprint_is_of_content_and_choice(tmp_path: Path) -> None:
    path = csv(tmp_path)
    data = load_data(path)
    assert data.fingerprint == load_data(path, batch_size=7).fingerprint
    copy = csv(tmp_path.joinpath("other").mkdir() or tmp_path / "other")
    assert data.fingerprint == load_data(copy).fingerprint
    others = [load_data(path, limit=20), load_data(path, limit=20, seed=1), load_data(path, columns={"x": ["a"]})]
    path.write_text(path.read_text() + "9,9,0\n")
    assert len({d.fingerprint for d in [data, *others, load_data(path)]}) == 5


@pytest.mark.parametrize(
    ("name", "value"), [("limit", 0), ("limit", -3), ("batch_size", 0), ("limit", True), ("batch_size", 1.5)]
)
def test_numbers_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"LW-C09 {name} is {value}"):
        load_data("sklearn:digits", **{name: value})


def test_data_without_labels_and_models_without_example(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n3,4\n")
    model = load(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)))
    data = load_data(tmp_path / "rows.csv", model)
    assert not data.labelled
    model.see(data[0])
    assert model.task == Fidelity("kl")


def test_digits_reach_a_vision_model() -> None:
    model = load(DIGITS)
    data = load_data("sklearn:digits", model, "test", 50, 16)
    assert [batch.size for batch in data] == [16, 16, 16, 2]
    assert model.predict(data[0]).shape == (16, 10)
    assert (float(data[0].args[0].min()), float(data[0].args[0].max())) == (-1.0, 1.0)
    assert data.name == "sklearn:digits[test]"
    model.see(data[0])
    assert model.task == Classification()

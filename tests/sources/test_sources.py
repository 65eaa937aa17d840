"""Every source opens what it names, and builds the same class again from plain data alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from layerwise.errors import MissingDependency, ModelFormatError, UsageError
from layerwise.heads import PooledEncoder
from layerwise.loading import load
from layerwise.source import SOURCES, Source, build
from layerwise.weights import save_weights
from tests.conftest import ROOT

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
}
USER_FILE = """
from dataclasses import dataclass

import torch
from beside import WIDTH
from torch import nn


@dataclass
class Settings:
    width: int = WIDTH


def build(depth=2, width=0):
    width = width or Settings().width
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(depth)))
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    (tmp_path / "mine.py").write_text(USER_FILE)
    return tmp_path / "mine.py"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def through_json(source: Source) -> Source:
    return Source.from_dict(json.loads(json.dumps(source.to_dict())))


def test_every_source_is_known() -> None:
    assert set(SOURCES) >= {"file", "head", "hf", "py", "timm"}


def test_a_built_class_takes_the_opened_weights(user_file: Path, llama: Path) -> None:
    specs = {
        "timm:vit_tiny_patch16_224?img_size=8&patch_size=2&embed_dim=16&depth=2&num_heads=2&num_classes=3": torch.randn(
            2, 3, 8, 8
        ),
        f"{user_file}:build?depth=3": torch.randn(2, 6),
        "py:torch.nn:Linear?in_features=3&out_features=2": torch.randn(2, 3),
        f"hf:{llama}": torch.randint(0, 60, (2, 7)),
    }
    for spec, inputs in specs.items():
        model = load(spec)
        assert model.source is not None
        again = build(through_json(model.source))
        assert type(again).__name__ == type(model.module).__name__
        again.load_state_dict(model.module.state_dict())
        with torch.no_grad():
            assert torch.equal(model.adapter.output(again(inputs)), model.adapter.output(model.module(inputs))), spec


def test_options_reach_the_factory(user_file: Path) -> None:
    model = load(f"{user_file}:build?depth=3&width=4")
    assert (len(model.module), model.module[0][0].in_features) == (3, 4)  # type: ignore[index,arg-type]
    assert model.source is not None
    assert model.source.settings["arguments"] == {"depth": 3, "width": 4}


def test_a_users_file_leaves_the_path_and_randomness_alone(user_file: Path) -> None:
    before, state = list(sys.path), torch.get_rng_state()
    one, two = load(f"{user_file}:build"), load(f"{user_file}:build")
    assert sys.path == before
    assert torch.equal(torch.get_rng_state(), state)
    assert one.fingerprint == two.fingerprint
    sys.modules.pop("beside")


def test_a_changed_file_is_said_when_it_is_built_again(user_file: Path) -> None:
    source = load(f"{user_file}:build").source
    assert source is not None
    user_file.write_text(USER_FILE + "\n# a comment\n")
    with pytest.warns(UserWarning, match="has changed since the model was saved"):
        build(source)


def test_weights_go_into_a_factorys_module(user_file: Path, tmp_path: Path) -> None:
    model = load(f"{user_file}:build")
    save_weights(tmp_path / "w.safetensors", {k: v + 1 for k, v in model.module.state_dict().items()})
    filled = load(f"{user_file}:build", weights=tmp_path / "w.safetensors")
    assert torch.equal(filled.module[0][0].weight, model.module[0][0].weight + 1)  # type: ignore[index]
    assert filled.notes == ()
    save_weights(tmp_path / "other.safetensors", {"0.0.weight": torch.zeros(2, 2)})
    with pytest.raises(ModelFormatError, match=r"LW-M5.*other\.safetensors.*missing.*'0\.0\.bias'"):
        load(f"{user_file}:build", weights=tmp_path / "other.safetensors")


def test_a_packages_factory() -> None:
    model = load("py:torch.nn:Linear?in_features=3&out_features=2")
    assert isinstance(model.module, nn.Linear)
    assert model.name == "Linear"


def test_the_example_file_is_opened() -> None:
    model = load(f"{ROOT}/examples/cifar_resnet.py:resnet20")
    assert sum(p.numel() for p in model.module.parameters()) == 269_722
    assert model.predict(model.example).shape == (2, 10)
    skippable = [layer.name for layer in model.layers if layer.skippable]
    assert len(model.layers) == 9
    assert "layer2.0" not in skippable
    assert len(skippable) == 7


def test_transformers_weights_are_those_of_the_library(llama: Path) -> None:
    ids = torch.randint(0, 60, (2, 7))
    model = load(f"hf:{llama}")
    reference = tf.LlamaForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        assert torch.equal(model.module(ids).logits, reference(ids).logits)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight  # type: ignore[union-attr]  # still tied
    assert model.name == "llama"
    assert model.domain == "text"
    assert load(llama).fingerprint == model.fingerprint, "a plain folder works as well"


def test_a_bare_encoder_is_pooled(tmp_path: Path) -> None:
    tf.BertModel(tf.BertConfig(**SIZES)).save_pretrained(tmp_path)
    model = load(f"hf:{tmp_path}")
    assert isinstance(model.module, PooledEncoder)
    assert model.predict(model.example).shape == (2, 16)


def test_shards_are_read_and_checked(tmp_path: Path) -> None:
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load(f"hf:{tmp_path}").module.classifier.weight, model.classifier.weight)  # type: ignore[union-attr]
    shards[0].unlink()
    with pytest.raises(ModelFormatError, match="LW-M60"):
        load(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        (lambda t: t.pop("model.norm.weight"), "LW-M55", "'model.norm.weight'"),
        (lambda t: t.update(junk=torch.zeros(2)), "LW-M56", "'junk'"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "LW-M57", "model.norm.weight: file (3,), model (16,)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(llama: Path, change: Any, code: str, name: str) -> None:
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(ModelFormatError) as caught:
        load(f"hf:{llama}")
    assert caught.value.code == code
    assert name in str(caught.value)


def test_a_folder_without_weights_is_refused_unless_asked(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds a configuration but no weights.*\?random=true"):
        load(f"hf:{llama}")
    one, two = load(f"hf:{llama}?random=true"), load(f"hf:{llama}?random=true")
    assert one.fingerprint == two.fingerprint
    assert one.notes == ("no weights were given: they are random, drawn with seed 0",)


def test_pickles_with_code_are_refused(llama: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return print, ("it ran",)

    (llama / "model.safetensors").unlink()
    torch.save({"w": Attack()}, llama / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match="LW-M47"):
        load(f"hf:{llama}")


def test_plain_tensors_in_a_bin_file_load(llama: Path) -> None:
    want = load(f"hf:{llama}").fingerprint
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(tensors, llama / "pytorch_model.bin")
    assert load(f"hf:{llama}").fingerprint == want


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"architectures": ["MyOwnModel"], "model_type": "llama"}, "'MyOwnModel' is not a model class"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}, "never run"),
        ({"architectures": ["torch"], "model_type": "llama"}, "'torch' is not a model class"),
    ],
)
def test_code_of_a_repository_is_never_run(llama: Path, config: dict[str, Any], text: str) -> None:
    (llama / "evil.py").write_text("raise SystemExit('it ran')")
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFormatError) as caught:
        load(f"hf:{llama}")
    assert text in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_broken_configuration_is_named(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(ModelFormatError, match=r"config\.json: is no configuration that transformers can read"):
        load(f"hf:{llama}")


@pytest.mark.parametrize(("spec", "package", "extra"), [("timm:resnet18", "timm", "vision"), ("hf:x/y", "transformers", "text")])
def test_missing_packages_are_named_with_their_extra(
    spec: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf"pip install 'layerwise\[{extra}\]'"):
        load(spec)

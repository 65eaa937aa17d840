"""The demo's network, its cache, and (soak) the whole demo as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from layerwise import engine
from layerwise.cli import demo, digits
from layerwise.cli.screen import Screen
from layerwise.errors import ProofFailed
from layerwise.files import verify_manifest
from layerwise.model import UniversalModel

pytest.importorskip("timm", reason="the demo's network comes from timm")
SHORT = digits.Recipe(epochs=12, batch_size=8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def trained(samples: int = 64) -> tuple[UniversalModel, torch.Tensor, torch.Tensor]:
    model = engine.load(digits.SPEC, "classification")
    batch = engine.load_data(digits.DATA, model, "train", samples, samples)[0]
    steps: list[tuple[int, int]] = []
    digits.train_(model, batch.args[0], batch.labels, SHORT, lambda done, total: steps.append((done, total)))
    assert steps == [(i, 12) for i in range(1, 13)]
    return model, batch.args[0], batch.labels


def test_training_learns_and_is_the_same_every_time() -> None:
    model, images, labels = trained()
    assert digits.accuracy(model, images, labels) > 0.3  # a guess is right in one of ten
    assert model.fingerprint == trained()[0].fingerprint
    assert not model.module.training


def test_the_cache_gives_the_weights_back_and_not_damaged_ones() -> None:
    model = trained()[0]
    assert digits.cached_weights(SHORT) is None
    file = digits.keep_weights(model.module, SHORT)
    assert digits.cached_weights(SHORT) == file
    assert digits.cached_weights(digits.Recipe(epochs=3)) is None
    assert engine.load(digits.SPEC, "classification", file).fingerprint == model.fingerprint
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert digits.cached_weights(SHORT) is None
    digits.keep_weights(model.module, SHORT)
    assert digits.cached_weights(SHORT) == file


def test_a_relative_cache_place_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert digits.cache_folder(SHORT).parents[1] == Path.home() / ".cache"


def test_a_network_that_did_not_learn_is_no_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "train_", lambda *args: None)
    with pytest.raises(ProofFailed, match="less than 97%"):
        demo.trained_weights(Screen(as_json=True))
    assert digits.cached_weights(digits.Recipe()) is None


def test_one_thread_is_given_back() -> None:
    torch.set_num_threads(2)
    with digits.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_whole_demo_in_three_minutes(tmp_path: Path) -> None:
    begun = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "layerwise", "demo", "--out", "demo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - begun < 180
    assert "Both targets are met." in run.stdout
    verify_manifest(tmp_path / "demo")

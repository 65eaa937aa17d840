"""Shared by all tests: two threads, no network, warnings that are ours are errors, and the real data where it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


def data_folder() -> Path:
    """Where the real data is: `LAYERWISE_DATA`, else ``../shared/data`` beside the checkout."""
    return Path(os.environ.get("LAYERWISE_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """Small tensors on shared cores: more threads only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's leaderboard."""
    monkeypatch.setenv("LAYERWISE_DB", f"sqlite:///{tmp_path}/leaderboard.db")


@pytest.fixture
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real data that the test's ``data`` marker names; skipped with the reason where it is absent."""
    marker = request.node.get_closest_marker("data")
    folder = data_folder() / (marker.args[0] if marker else "")
    if not folder.is_dir():
        pytest.skip(f"the test data folder {folder} is absent")
    return folder

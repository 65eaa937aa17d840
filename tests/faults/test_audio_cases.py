"""Bad clips: not decodable, without a sample, with an impossible rate, not numbers. File and row are named."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
from torch import nn

from layerwise.errors import DataError, DataShardError, LayerwiseError
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel


def listener() -> UniversalModel:
    module = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    module.audio_cfg = {"rate": 8000, "kind": "waveform", "most": 40, "least": 40}  # type: ignore[assignment]  # how it says what it hears
    return load(module)


def clip(samples: int, rate: int = 8000, kind: str = "WAV") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.linspace(-1, 1, samples), rate, format=kind)
    return out.getvalue()


def damaged() -> bytes:
    """A FLAC file that ends in its header."""
    return clip(4000, kind="FLAC")[:60]


GOOD = clip(400)
CASES: list[tuple[str, Any, type[LayerwiseError], str, list[str]]] = [
    ("no audio at all", b"RIFF and then nothing", DataShardError, "LW-D12", ["cannot be decoded"]),
    ("cut short", damaged(), DataShardError, "LW-D12", ["cannot be decoded"]),
    ("empty bytes", b"", DataShardError, "LW-D12", ["cannot be decoded"]),
    ("0 seconds", clip(0), DataError, "LW-D29", ["0 seconds"]),
    ("no such file", "gone.wav", DataError, "LW-D32", ["gone.wav", "Looked for"]),
    ("no clip", None, DataError, "LW-D32", ["no audio"]),
]


@pytest.mark.parametrize(("value", "kind", "code", "named"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_bad_clip_is_named(tmp_path: Path, value: Any, kind: type[LayerwiseError], code: str, named: list[str]) -> None:
    other = "good.wav" if isinstance(value, str) else GOOD
    (tmp_path / "good.wav").write_bytes(GOOD)
    pd.DataFrame({"audio": [other, value], "label": [0, 1]}).to_parquet(tmp_path / "clips.parquet")
    complaint = failure(lambda: load_data(tmp_path / "clips.parquet", listener()), kind, code)
    assert not [part for part in ["clips.parquet, row 1", *named] if part not in complaint], complaint


SAMPLES = np.ones(50, np.float32)
ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("rate 0", {"audio": SAMPLES, "sample_rate": 0}, "LW-D32", "sampling rate is 0"),
    ("rate of a half", {"audio": SAMPLES, "sample_rate": 8000.5}, "LW-D32", "8000.5"),
    ("rate NaN", {"audio": SAMPLES, "sample_rate": float("nan")}, "LW-D32", "nan"),
    ("rate in words", {"audio": SAMPLES, "sample_rate": "8 kHz"}, "LW-D32", "'8 kHz'"),
    ("rate of a gigahertz", {"audio": SAMPLES, "sample_rate": 10**9}, "LW-D32", "1000000000"),
    ("samples are NaN", {"audio": SAMPLES * np.nan}, "LW-D33", "NaN"),
    ("no sample", {"audio": SAMPLES[:0]}, "LW-D29", "0 seconds"),
    ("three dimensions", {"audio": np.ones((2, 2, 2), np.float32)}, "LW-D32", "(2, 2, 2)"),
    ("a number", {"audio": 3}, "LW-D32", "int"),
]


@pytest.mark.parametrize(("row", "code", "text"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_a_bad_row_is_named(row: dict[str, Any], code: str, text: str) -> None:
    complaint = failure(lambda: load_data([{"audio": SAMPLES}, row], listener()), DataError, code)
    assert "row 1" in complaint
    assert text in complaint


def test_samples_that_are_no_numbers() -> None:
    complaint = failure(lambda: load_data([{"audio": ["a", "b"]}], listener()), DataError, "LW-D32")
    assert "no numbers" in complaint


def failure(action: Callable[[], Any], kind: type[LayerwiseError], code: str) -> str:
    with pytest.raises(LayerwiseError) as caught:
        action()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert caught.value.exit_code == 3
    assert text.startswith(f"{code} "), text
    assert "\n" not in text
    assert caught.value.remedy, text
    return text

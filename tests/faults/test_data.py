"""Bad data, cases 29 to 42 of the fault list and F12: the class, the code, and that file and row are named."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from layerwise.data import Data
from layerwise.errors import DataError, DataShardError, LayerwiseError
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel
from layerwise.readers import SameDataWarning, warn_if_same
from layerwise.task import Classification


def png(width: int, height: int) -> bytes:
    """A header that claims this size, and no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def reader_of_images() -> UniversalModel:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    module(torch.zeros(1, 3, 8, 8))
    module.pretrained_cfg = {"input_size": (3, 8, 8)}  # type: ignore[assignment]  # how a module says what it reads
    return load(module)


def language_model() -> UniversalModel:
    return load(
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=8, bos_token_id=1, eos_token_id=2))
    )


def three_classes() -> UniversalModel:
    return load(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)), example=torch.zeros(2, 2))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def parquet(path: Path, rows: dict[str, list[Any]], *, group: int = 1000) -> Path:
    pd.DataFrame(rows).to_parquet(path, row_group_size=group)
    return path


def empty_csv(folder: Path) -> Any:
    return load_data(write(folder / "none.csv", "a,label\n"))


def empty_folder(folder: Path) -> Any:
    (folder / "nothing").mkdir()
    return load_data(folder / "nothing")


def empty_list(folder: Path) -> Any:
    return load_data([])


def no_label_column(folder: Path) -> Any:
    return load_data(parquet(folder / "rows.parquet", {"text": ["a"], "stars": [1]}), columns={"label": "rating"})


def mixed_features(folder: Path) -> Any:
    return load_data(write(folder / "mixed.csv", "a,b,label\n1,2,0\n3,4,1\n5,many,0\n"))


def mixed_labels(folder: Path) -> Any:
    return load_data(write(folder / "mixed.jsonl", '{"x": [1.0], "label": 0}\n{"x": [2.0], "label": "one"}\n'))


def mixed_text(folder: Path) -> Any:
    return load_data(write(folder / "mixed.jsonl", '{"text": "a"}\n{"text": 7}\n'), language_model())


def missing_label(folder: Path) -> Any:
    return load_data(parquet(folder / "gap.parquet", {"a": [1.0, 2.0], "label": ["x", None]}))


def nan_in_column(folder: Path) -> Any:
    table = pa.table({"a": [1.0, 2.0, float("nan")], "label": [0, 1, 0]})  # pandas would write an empty value instead
    pq.write_table(table, folder / "nan.parquet")
    return load_data(folder / "nan.parquet")


def gap_in_column(folder: Path) -> Any:
    return load_data(parquet(folder / "gap.parquet", {"a": [1.0, None], "label": [0, 1]}))


def infinity_in_csv(folder: Path) -> Any:
    return load_data(write(folder / "inf.csv", "a,label\n1,0\ninf,1\n"))


def nan_in_image(folder: Path) -> Any:
    rows = [{"image": np.ones((8, 8), np.float32)}, {"image": np.full((8, 8), np.nan, np.float32)}]
    return load_data(rows, reader_of_images())[0]


def label_outside(folder: Path) -> Any:
    return load_data(write(folder / "labels.csv", "a,b,label\n1,2,0\n1,2,3\n"), three_classes())


def label_outside_in_batch(folder: Path) -> Any:
    model = three_classes()
    model.task = Classification()
    return model.loss((torch.zeros(2, 2), torch.tensor([0, 5])))


def cut_gzip(folder: Path) -> Any:
    whole = gzip.compress("\n".join(json.dumps({"x": [i], "label": 0}) for i in range(500)).encode())
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return load_data(folder / "cut.jsonl.gz")


def cut_parquet(folder: Path) -> Any:
    path = parquet(folder / "cut.parquet", {"a": list(range(1000))})
    path.write_bytes(path.read_bytes()[:-100])
    return load_data(path)


def cut_zip(folder: Path) -> Any:
    path = archive(folder / "cut.zip", {"rows.csv": b"a,label\n1,0\n"})
    path.write_bytes(path.read_bytes()[:-30])
    return load_data(path)


def archive(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in entries.items():
            out.writestr(name, content)
    return path


def zip_outside(folder: Path) -> Any:
    inner = folder / "inner"
    inner.mkdir()
    return load_data(archive(inner / "evil.zip", {"../rows.csv": b"a,label\n1,0\n"}))


def zip_link(folder: Path) -> Any:
    with zipfile.ZipFile(folder / "link.zip", "w") as out:
        info = zipfile.ZipInfo("rows.csv")
        info.external_attr = 0o120777 << 16
        out.writestr(info, "/etc/passwd")
    return load_data(folder / "link.zip")


def zip_bomb(folder: Path) -> Any:
    return load_data(archive(folder / "bomb.zip", {"rows.txt": bytes(32 * 2**20)}))


def gzip_bomb(folder: Path) -> Any:
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(bytes(32 * 2**20)))
    return load_data(folder / "bomb.txt.gz")


def image_rows(content: bytes) -> Callable[[Path], Any]:
    def action(folder: Path) -> Any:
        path = parquet(folder / "images.parquet", {"image": [content], "label": [0]})
        return load_data(path, reader_of_images())[0]

    return action


def token_outside(folder: Path) -> Any:
    return load_data([{"input_ids": [3, 4]}, {"input_ids": [3, 50]}], language_model())


def too_long(folder: Path) -> Any:
    model = language_model()
    model.adapter = dataclasses.replace(model.adapter, truncate=False)  # type: ignore[type-var]  # every adapter is a dataclass
    return load_data([{"input_ids": [3] * 8}, {"input_ids": [3] * 9}], model)


def open_quote(folder: Path) -> Any:
    lines = ["text,label", "fine,0", '"never closed,1', *(f"row {i},0" for i in range(50))]
    return load_data(write(folder / "quote.csv", "\n".join(lines)), language_model())


CASES: list[tuple[str, Callable[[Path], Any], type[LayerwiseError], str, list[str]]] = [
    ("29 empty set, CSV", empty_csv, DataError, "LW-D29", ["none.csv", "empty"]),
    ("29 empty set, folder", empty_folder, DataError, "LW-D29", ["nothing", "empty"]),
    ("29 empty set, list", empty_list, DataError, "LW-D29", ["list", "empty"]),
    ("31 no label column", no_label_column, DataError, "LW-D31", ["rows.parquet", "'rating'", "text, stars"]),
    ("32 mixed types, features", mixed_features, DataError, "LW-D32", ["mixed.csv, row 2 (line 4)", "'b'", "'many'"]),
    ("32 mixed types, labels", mixed_labels, DataError, "LW-D32", ["mixed.jsonl, row 1 (line 2)", "'one'", "mixed"]),
    ("32 mixed types, text", mixed_text, DataError, "LW-D32", ["mixed.jsonl, row 1 (line 2)", "'text'", "int"]),
    ("32 missing label", missing_label, DataError, "LW-D32", ["gap.parquet, row 1", "'label' is empty"]),
    ("32 empty feature", gap_in_column, DataError, "LW-D32", ["gap.parquet, row 1", "'a' is empty"]),
    ("33 NaN in a column", nan_in_column, DataError, "LW-D33", ["nan.parquet, row 2", "'a'", "nan"]),
    ("33 infinity in CSV", infinity_in_csv, DataError, "LW-D33", ["inf.csv, row 1 (line 3)", "'a'", "inf"]),
    ("33 NaN in an image", nan_in_image, DataError, "LW-D33", ["list, row 1", "NaN"]),
    ("34 label outside, row", label_outside, DataError, "LW-D34", ["labels.csv, row 1 (line 3)", "3", "0 … 2"]),
    ("34 label outside, batch", label_outside_in_batch, DataError, "LW-D34", ["Label 5", "row 1", "3 classes"]),
    ("35 cut gzip", cut_gzip, DataShardError, "LW-D35", ["cut.jsonl.gz", "gzip", "Copy or download"]),
    ("35 cut parquet", cut_parquet, DataShardError, "LW-D35", ["cut.parquet", "parquet", "Copy or download"]),
    ("35 cut zip", cut_zip, DataShardError, "LW-D35", ["cut.zip", "zip", "Copy or download"]),
    ("36 zip with ../", zip_outside, DataError, "LW-D36", ["evil.zip", "'../rows.csv'", "nothing was unpacked"]),
    ("36 zip with a link", zip_link, DataError, "LW-D36", ["link.zip", "'rows.csv'"]),
    ("37 zip bomb", zip_bomb, DataError, "LW-D37", ["bomb.zip", "to 1", "33,554,432"]),
    ("37 gzip bomb", gzip_bomb, DataError, "LW-D37", ["bomb.txt.gz", "to 1"]),
    ("38 image of 0×0", image_rows(png(0, 0)), DataError, "LW-D38", ["images.parquet, row 0", "0×0"]),
    ("38 image of 10^9 pixels", image_rows(png(40000, 25000)), DataError, "LW-D38", ["images.parquet, row 0", "1000000000"]),
    ("39 token id ≥ vocabulary", token_outside, DataError, "LW-D39", ["list, row 1", "50", "vocabulary of 50"]),
    ("40 sequence over the maximum", too_long, DataError, "LW-D40", ["list, row 1", "9 tokens", "maximum is 8"]),
    ("41 CSV with an open quote", open_quote, DataError, "LW-D41", ["quote.csv, row 1 (line 3)", "never closed"]),
    ("F12 damaged image", image_rows(b"\xff\xd8\xff\xe0 no image"), DataShardError, "LW-D12", ["images.parquet, row 0"]),
]


@pytest.mark.parametrize(("action", "kind", "code", "named"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_data(tmp_path: Path, action: Callable[[Path], Any], kind: type[LayerwiseError], code: str, named: list[str]) -> None:
    with pytest.raises(LayerwiseError) as caught:
        action(tmp_path)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert caught.value.exit_code == 3
    assert text.startswith(f"{code} "), text
    assert "\n" not in text
    assert caught.value.remedy, text
    assert not [part for part in named if part not in text], text


def test_30_one_row_works_and_says_what_it_lacks(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "one.csv", "a,b,label\n1,2,1\n"), three_classes())
    assert data.samples == 1
    assert data[0].labels.tolist() == [1]
    assert "one row only: no standard error can be given" in data.notes


def test_36_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        zip_outside(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "evil.zip"]


def test_38_the_pixels_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(Image.Image, "convert", lambda *a, **k: pytest.fail("pixels were decoded"))
    with pytest.raises(DataError, match="LW-D38"):
        image_rows(png(10_000, 9_000))(tmp_path)


def test_40_a_long_sequence_is_cut_and_said() -> None:
    data = load_data([{"input_ids": [3] * 8}, {"input_ids": [3] * 9}], language_model())
    assert data[0].kwargs["input_ids"].shape == (2, 8)
    assert data.notes == ("1 of 2 texts were cut to the model's 8 tokens (the longest has 9)",)


@pytest.mark.parametrize("shared", [10, 2])
def test_42_the_same_rows_in_train_and_test(tmp_path: Path, shared: int) -> None:
    train = load_data(write(tmp_path / "train.csv", "a,label\n" + "".join(f"{i},0\n" for i in range(10))))
    test = load_data(write(tmp_path / "test.csv", "a,label\n" + "".join(f"{10 - shared + i},0\n" for i in range(10))))
    with pytest.warns(SameDataWarning, match=r"LW-D42.*10 rows of test.csv are rows of train.csv") as caught:
        text = warn_if_same(train, test)
    assert str(caught[0].message) == text
    assert text is not None
    assert text.startswith("LW-D42 All 10" if shared == 10 else f"LW-D42 {shared} of 10")


def test_42_other_rows_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    ready = [Data.of([(torch.full((4, 2), float(i)), torch.zeros(4))]) for i in range(2)]
    assert warn_if_same(*ready) is None
    assert not recwarn.list
    with pytest.warns(SameDataWarning, match="All 4"):
        warn_if_same(ready[0], Data.of([(torch.zeros(4, 2), torch.ones(4))]))


def flipped_inside(path: Path) -> Path:
    """Damage in the second row group's page, which its checksum notices."""
    rows = np.random.default_rng(0).random(2000)
    table = pa.table({"a": rows, "label": [0] * 2000})
    pq.write_table(table, path, row_group_size=1000, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    place = bytes(content).find(rows[1500:1502].tobytes())
    assert place > 0
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))
    return path


def test_f12_a_damaged_shard_is_named_with_its_rows(tmp_path: Path) -> None:
    with pytest.raises(DataShardError) as caught:
        load_data(flipped_inside(tmp_path / "shard.parquet"))
    assert str(caught.value).startswith("LW-D12 ")
    assert "rows 1000 to 1999" in str(caught.value)
    assert "shard.parquet" in str(caught.value)


def test_f12_a_damaged_shard_is_left_out_only_where_that_is_allowed(tmp_path: Path) -> None:
    for i in range(3):
        parquet(tmp_path / f"part-{i}.parquet", {"a": [float(i)] * 4, "label": [0] * 4})
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(DataShardError, match=r"part-1\.parquet"):
        load_data(tmp_path)
    data = load_data(tmp_path, max_bad_shards=1)
    assert data.samples == 8
    assert data.notes == ("1 of 3 files are damaged and were left out: part-1.parquet",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a,label\n1,0\n1,2,3\n", "row 1 (line 3): The row has 3 fields, the header 2."),
        ("a,a\n1,2\n", "names 'a' twice"),
        ("a,label\n\xe9,0\n", "not UTF-8"),
    ],
)
def test_other_broken_csv(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / "rows.csv")
    assert str(caught.value).startswith("LW-D41 ")
    assert text in str(caught.value)


def test_a_broken_json_line_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", '{"x": [1.0]}\n\n{"x": [1.0}\n')
    with pytest.raises(DataError, match=r"LW-D41 .*rows.jsonl, row 1 \(line 3\)"):
        load_data(tmp_path / "rows.jsonl")


def test_audio_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF and no more")
    write(tmp_path / "clips.csv", "path,label\na.wav,0\n")
    with pytest.raises(DataShardError, match=r"clips.csv, row 0 \(line 2\).*cannot be decoded"):
        load_data(tmp_path / "clips.csv")


def test_the_bomb_of_these_tests_is_one() -> None:
    assert len(gzip.compress(bytes(32 * 2**20))) * 900 < 32 * 2**20

"""Readers: the right rows, names, labels and fingerprints from every kind of source. Broken ones: tests/faults/test_data.py."""

from __future__ import annotations

import gzip
import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from layerwise.adapters.text import TextModalityAdapter
from layerwise.data import Data
from layerwise.errors import DataError, LayerwiseError, MissingDependency, UsageError
from layerwise.loading import load_data
from layerwise.readers import Request, read
from layerwise.readers.columns import with_roles

ROWS = [{"text": f"text {i}", "stars": ["good", "bad"][i % 2], "split": ["train", "test"][i // 4]} for i in range(6)]


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    lines = [json.dumps(row) for row in ROWS]
    csv = ["text,stars,split", *(",".join(row.values()) for row in ROWS)]
    content = {".jsonl": "\n".join(lines), ".csv": "\n".join(csv), ".tsv": "\n".join(csv).replace(",", "\t")}
    kind = suffix.removesuffix(".gz")
    if kind == ".parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    elif suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(content[kind].encode()))
    else:
        path.write_text("\ufeff" + content[kind] if kind == ".csv" else content[kind], encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl", ".jsonl.gz", ".csv.gz"])
def test_every_table_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    table = with_roles(read(write_rows(tmp_path, suffix), Request()), {"label": "stars"})
    assert [row["text"] for row in table.rows] == [f"text {i}" for i in range(6)]
    assert [row["label"] for row in table.rows] == [1, 0, 1, 0, 1, 0]
    assert table.classes == ("bad", "good")
    assert table.notes == ("2 label classes: 0 = bad, 1 = good",)
    assert len(table.fingerprint) == 64
    assert table.name == f"rows{suffix}"
    test = with_roles(read(tmp_path / f"rows{suffix}", Request(split="test")), {"label": "stars"})
    assert [row["text"] for row in test.rows] == ["text 4", "text 5"]


def test_an_unknown_split_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no split 'tset'\. Did you mean 'test'\?"):
        read(write_rows(tmp_path, ".csv"), Request(split="tset"))


def test_quoted_fields_and_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines, ""quoted""",1\n\nplain,0\n')
    rows = read(tmp_path / "a.csv", Request()).rows
    assert rows[0]["text"] == 'two\nlines, "quoted"'
    assert [row.place.rpartition("/")[2] for row in rows] == ["a.csv, row 0 (line 2)", "a.csv, row 1 (line 5)"]


def test_plain_text_is_a_row_per_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" = Title = \n \n first\nstill first\n\n\nsecond")
    rows = read(tmp_path / "a.txt", Request()).rows
    assert [row["text"] for row in rows] == [" = Title = ", " first\nstill first", "second"]
    assert rows[2].place.endswith("row 2 (line 7)")


def images_in(folder: Path, splits: tuple[str, ...] = ("",)) -> Path:
    for split in splits:
        for i, name in enumerate(["cat", "dog", "ant"]):
            (folder / split / name).mkdir(parents=True)
            for k in range(2):
                Image.fromarray(np.full((4, 4, 3), 40 * i + k, np.uint8)).save(folder / split / name / f"{k}.png")
    (folder / "README.md").write_text("not an image")
    return folder


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for file in sorted(folder.rglob("*")):
            out.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_folder_has_a_class_per_subfolder(tmp_path: Path, packed: bool) -> None:
    folder = images_in(tmp_path / "pets")
    table = read(zipped(folder, tmp_path / "pets.zip") if packed else folder, Request())
    assert table.classes == ("ant", "cat", "dog")
    assert [row["label"] for row in table.rows] == [0, 0, 1, 1, 2, 2]
    assert table.rows[2].place.endswith("image cat/0.png")
    assert isinstance(table.rows[0]["image"], bytes if packed else str)
    assert table.notes == ("1 files that are no images were left out",)


def test_splits_of_an_image_folder(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "pets", ("train", "test"))
    with pytest.raises(UsageError, match=r"holds several splits\. Choose one by split=: test, train"):
        read(folder, Request())
    table = read(folder, Request(split="test"))
    assert [row["label"] for row in table.rows] == [0, 0, 1, 1, 2, 2]
    assert all("/test/" in row["image"] for row in table.rows)


def test_a_flat_folder_of_images_has_no_labels(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    table = read(tmp_path, Request())
    assert list(table.rows[0]) == ["image"]
    assert table.classes == ()


def test_shards_are_read_in_order_and_splits_by_file_name(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for i in range(2):
            rows = {"a": [float(i)], "label": [len(split) % 2]}
            pd.DataFrame(rows).to_parquet(tmp_path / f"{split}-0000{i}-of-00002.parquet")
    with pytest.raises(UsageError, match=r"several data sets\. Choose one by split=: test, train"):
        read(tmp_path, Request())
    assert [row["a"] for row in read(tmp_path, Request(split="train")).rows] == [0.0, 1.0]
    assert read(tmp_path, Request(split="test")).rows[0]["label"] == 0
    with pytest.raises(UsageError, match="has no split 'val'"):
        read(tmp_path, Request(split="val"))


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["part-0.csv", "part-1.csv"], None),
        (["shard00001.csv", "shard00002.csv"], None),
        (["0.csv", "1.csv"], None),
        (["esol.csv", "tox21.csv"], "esol, tox21"),
    ],
)
def test_which_files_belong_together(tmp_path: Path, names: list[str], groups: str | None) -> None:
    for name in names:
        (tmp_path / name).write_text("a\n1\n")
    if groups is None:
        assert len(read(tmp_path, Request()).rows) == 2
        return
    with pytest.raises(UsageError, match=f"several data sets. Choose one by split=: {groups}"):
        read(tmp_path, Request())


def test_a_folder_of_other_files_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "t10k.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"LW-D29 .*holds 1 files and none that is read as data, such as 't10k\.npz'.*\.parquet"):
        read(tmp_path, Request())


def test_numeric_columns_are_features_and_the_rest_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,name,b,y\n1,x,2.5,0\n3,y,4.5,1\n")
    data = load_data(tmp_path / "a.csv")
    assert data[0].args[0].tolist() == [[1.0, 2.5], [3.0, 4.5]]
    assert data[0].labels.tolist() == [0, 1]
    assert data.notes == ("columns left out because they hold no numbers: name",)
    chosen = load_data(tmp_path / "a.csv", columns={"x": ["b"], "label": "name"})
    assert chosen[0].args[0].tolist() == [[2.5], [4.5]]
    assert chosen.notes == ("2 label classes: 0 = x, 1 = y",)


def test_unknown_roles_and_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".csv")
    with pytest.raises(UsageError, match=r"Unknown column role 'labl'\. Did you mean 'label'\?"):
        load_data(path, columns={"labl": "stars"})
    with pytest.raises(DataError, match=r"LW-D31 .*no column 'words' for 'text'.*text, stars, split"):
        load_data(path, columns={"text": "words"})


def test_one_value_that_is_no_whole_number_makes_a_column_of_targets(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,label\n1,2\n2,0.5\n3,-1\n")
    data = load_data(tmp_path / "a.csv")
    assert data[0].labels.tolist() == [2.0, 0.5, -1.0]
    assert data[0].labels.dtype == torch.float32
    assert data.notes == ("'label' holds real values: they are targets, not classes",)
    (tmp_path / "a.csv").write_text("a,label\n1,0.5\n2,inf\n")
    with pytest.raises(DataError, match=r"LW-D32 .*row 1 \(line 3\): 'label' is infinite"):
        load_data(tmp_path / "a.csv")


def test_several_targets_may_have_gaps(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,p,q\n1,0,1\n2,,1\n3,0.5,\n")
    data = load_data(tmp_path / "a.csv", columns={"label": ["q", "p"]})
    assert data[0].args[0].tolist() == [[1.0], [2.0], [3.0]], "targets are no features"
    assert str(data[0].labels.tolist()) == "[[1.0, 0.0], [1.0, nan], [nan, 0.5]]"
    assert data.notes == ("2 targets, 2 of 6 values missing",)
    (tmp_path / "a.csv").write_text("a,p,q\n1,0,1\n2,,\n3,1,1\n")
    fewer = load_data(tmp_path / "a.csv", columns={"label": ["q", "p"]})
    assert fewer[0].args[0].tolist() == [[1.0], [3.0]]
    assert fewer.notes == ("1 rows without a value in any target column were left out",)
    (tmp_path / "a.csv").write_text("a,p,q\n1,,\n2,,\n")
    with pytest.raises(DataError, match=r"LW-D32 a\.csv: None of the target columns has a value in any row"):
        load_data(tmp_path / "a.csv", columns={"label": ["q", "p"]})
    (tmp_path / "a.csv").write_text("a,p,q\n1,0,high\n")
    with pytest.raises(DataError, match=r"LW-D32 .*row 0 \(line 2\).*'q' holds 'high'"):
        load_data(tmp_path / "a.csv", columns={"label": ["q", "p"]})
    with pytest.raises(DataError, match=r"LW-D31 .*no column 'r' for 'label'"):
        load_data(tmp_path / "a.csv", columns={"label": ["q", "r"]})


def test_lists_of_targets_in_one_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": [1], "label": [0, 1]}\n{"x": [2], "label": [null, 0]}\n')
    assert str(load_data(tmp_path / "a.jsonl")[0].labels.tolist()) == "[[0.0, 1.0], [nan, 0.0]]"
    (tmp_path / "a.jsonl").write_text('{"x": [1], "label": [0, 1]}\n{"x": [2], "label": [1]}\n')
    with pytest.raises(DataError, match=r"LW-D32 .*row 1 \(line 2\).*as many values as in the first row"):
        load_data(tmp_path / "a.jsonl")[0]


def test_digits_come_in_a_fixed_stratified_split() -> None:
    train, test = (read("sklearn:digits", Request(split=s)) for s in ("train", "test"))
    assert (len(train.rows), len(test.rows)) == (1437, 360)
    assert not {r.place for r in train.rows} & {r.place for r in test.rows}
    counts = np.bincount([row["label"] for row in test.rows])
    assert counts.min() >= 34
    assert test.rows[0]["image"].shape == (8, 8)
    assert max(row["image"].max() for row in test.rows) == 1.0
    assert [r.place for r in read("sklearn:digits", Request(split="test")).rows] == [r.place for r in test.rows]
    assert len(read("sklearn:digits", Request()).rows) == 1797
    assert load_data("sklearn:iris")[0].args[0].shape == (32, 4)
    progress = load_data("sklearn:diabetes", split="test", batch_size=89)[0]
    assert progress.args[0].shape == (89, 10)
    assert 25 <= float(progress.labels.min()) < 100 < float(progress.labels.max()) <= 346, "values, not classes"


def test_audio_manifest(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "clips").mkdir()
    for i in range(2):
        stereo = np.stack([np.full(80, 0.25 * i), np.zeros(80)], 1)
        soundfile.write(tmp_path / "clips" / f"{i}.wav", stereo, 8000)
    lines = [json.dumps({"path": f"clips/{i}.wav", "label": f"word {i}"}) for i in range(2)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    data = load_data(tmp_path / "manifest.jsonl")
    assert data[0].args[0].shape == (2, 80)
    np.testing.assert_allclose(data[0].args[0][1].numpy(), 0.125, atol=1e-4)
    assert data[0].labels.tolist() == [0, 1]
    assert data.batches[0][0]["sample_rate"] == 8000


def test_audio_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("path,label\na.wav,0\n")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingDependency, match=r"pip install 'layerwise\[audio\]'"):
        load_data(tmp_path / "a.csv")


class FakeHub(types.ModuleType):
    """Stands in for the package `datasets`."""

    @staticmethod
    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        if name == "away":
            raise ConnectionError("offline")
        parts = {"train": [{"text": "a", "label": 0}, {"text": "b", "label": 1}], "test": [{"text": "c", "label": 1}]}
        return parts[split] if split else parts


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub("datasets"))
    assert [row["text"] for row in read("hf:there", Request(split="train")).rows] == ["a", "b"]
    with pytest.raises(UsageError, match="Choose one by split=: train, test"):
        read("hf:there", Request())
    with pytest.raises(DataError, match=r"hf:away: .*ConnectionError: offline.*Without a network"):
        read("hf:away", Request(split="train"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match="pip install datasets"):
        read("hf:there", Request())


class Letters(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[str, int]:
        return "abcde"[index], index % 2


class Counting(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return ((torch.full((2,), float(i)), i % 3) for i in range(100))


def test_torch_data_sets_of_tensors_are_stacked() -> None:
    xs, ys = torch.arange(20.0).reshape(10, 2), torch.arange(10)
    data = load_data(TensorDataset(xs, ys), batch_size=4)
    assert [batch.size for batch in data] == [4, 4, 2]
    assert torch.equal(torch.cat([b.args[0] for b in data]), xs)
    some = load_data(TensorDataset(xs, ys), limit=3)
    assert some.samples == 3
    assert torch.equal(some[0].args[0], xs[some[0].labels])
    stream = load_data(Counting(), limit=7, batch_size=5)
    assert [batch.labels.tolist() for batch in stream] == [[0, 1, 2, 0, 1], [2, 0]]


def test_torch_data_sets_of_text_are_rows() -> None:
    table = with_roles(load_rows(Letters()), {})
    assert [(row["text"], row["label"]) for row in table.rows] == [("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 0)]


def load_rows(value: Any) -> Any:
    from layerwise.readers.objects import read_object

    return read_object(value, Request(), 32)


def test_a_loader_passes_as_it_is() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10.0), torch.arange(10)), batch_size=4, shuffle=True)
    data = load_data(loader)
    assert [batch.size for batch in data] == [4, 4, 2]
    first = [batch.labels.tolist() for batch in data]
    assert first == [batch.labels.tolist() for batch in data], "the same order each time"


READY = torch.zeros(3, 2)
SHAPES: dict[str, Any] = {
    "tensors": [READY, READY],
    "one tensor": READY,
    "inputs": [(READY,)],
    "inputs and labels": [(READY, torch.zeros(3))],
    "keyword arguments": [{"x": READY, "labels": torch.zeros(3)}],
    "one dict": {"x": READY},
    "generator": (READY for _ in range(2)),
}


@pytest.mark.parametrize("value", SHAPES.values(), ids=SHAPES)
def test_ready_batches_pass_as_they_are(value: Any) -> None:
    data = load_data(value)
    assert isinstance(data, Data)
    assert all(batch.size == 3 for batch in data)
    assert load_data(data) is data
    assert load_data(data, limit=2).samples == 2


ITEMS: dict[str, tuple[Any, str]] = {
    "dicts": ({"text": "a", "label": 0}, "text"),
    "token lists": ({"input_ids": [1, 2]}, "input_ids"),
    "rows of tensors with a label": ({"image": torch.zeros(3, 4, 4), "label": 1}, "image"),
    "pictures": ((Image.new("RGB", (4, 4)), 0), "image"),
    "bytes": ((b"\x89PNG", 0), "image"),
    "arrays": ((np.zeros((4, 4)), 0), "image"),
    "vectors": ((np.zeros(4), 0), "x"),
    "texts": ("only text", "text"),
}


@pytest.mark.parametrize(("item", "column"), ITEMS.values(), ids=ITEMS)
def test_lists_of_rows(item: Any, column: str) -> None:
    assert column in load_rows([item]).rows[0]


def test_what_is_no_data_at_all() -> None:
    for value in (3, object(), [object()]):
        with pytest.raises(LayerwiseError):
            load_data(value)


def test_prepared_rows_are_not_tokenized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer sees each text once, however often the data is gone through."""
    calls: list[str] = []

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        calls.append(text)
        return {"input_ids": [1, 2]}

    tokenizer.all_special_ids = []  # type: ignore[attr-defined]
    adapter = TextModalityAdapter(vocabulary=5, tokenizer=tokenizer)
    model = types.SimpleNamespace(adapter=adapter, task=None, module=torch.nn.Identity())
    data = load_data([{"text": "a"}, {"text": "b"}], model)  # type: ignore[arg-type]  # as much of a model as is needed
    assert [batch.size for _ in range(3) for batch in data] == [2, 2, 2]
    assert calls == ["a", "b"]

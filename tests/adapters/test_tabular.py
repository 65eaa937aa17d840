"""Tables: columns by name, categories by code, numbers on the training rows' scale; saved, and strict about new rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from layerwise.adapter import adapter_for
from layerwise.adapters.tabular import TabularModalityAdapter
from layerwise.engine import analyze
from layerwise.errors import DataError
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel
from layerwise.rows import Record
from layerwise.saved import load_saved, save_model
from layerwise.scores import Status
from tests.tables import Described, FeatureTransformer, perceptron, rows

TRAIN = rows()


def fitted(module: Any = None) -> TabularModalityAdapter:
    return TabularModalityAdapter.fitted(module or FeatureTransformer(), TRAIN, categorical=["heating"])


def test_numbers_are_standardised_and_categories_coded() -> None:
    batch = fitted().collate(TRAIN)
    areas, rooms = (np.array([row[n] for row in TRAIN], dtype=float) for n in ("area", "rooms"))
    want = np.stack([(v - v.mean()) / v.std() for v in (areas, rooms)], 1)
    np.testing.assert_allclose(batch.kwargs["x_num"].numpy(), want, rtol=1e-6)
    assert batch.kwargs["x_cat"].tolist()[:3] == [[1, 0], [0, 1], [2, 0]], "Lima 0, Oslo 1, Pune 2"
    assert batch.kwargs["x_cat"].dtype == torch.int64
    assert batch.labels.tolist() == [row["label"] for row in TRAIN]


def test_the_scale_is_the_training_rows_whatever_the_batch_and_the_order_of_columns() -> None:
    adapter = fitted()
    whole = adapter.collate(TRAIN)
    shuffled = [dict(reversed(row.items())) for row in TRAIN[3:5]]
    part = adapter.collate(shuffled)
    for name in ("x_num", "x_cat"):
        assert torch.equal(part.kwargs[name], whole.kwargs[name][3:5])


def test_a_single_argument_gets_numbers_and_then_a_column_per_category() -> None:
    batch = fitted(perceptron()).collate(TRAIN[:2])
    two = fitted().collate(TRAIN[:2])
    assert torch.equal(batch.args[0][:, :2], two.kwargs["x_num"])
    assert batch.args[0][:, 2:].tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]


def test_columns_as_they_are_without_standardising() -> None:
    constant = [{**row, "floor": 2} for row in TRAIN]
    plain = TabularModalityAdapter.fitted(perceptron(), constant, standardize=False)
    assert plain.collate(constant[:1]).args[0].tolist()[0][:4] == [30.0, 1.0, 0.0, 2.0]
    scaled = TabularModalityAdapter.fitted(perceptron(), constant)
    assert scaled.collate(constant).args[0][:, 3].tolist() == [0.0] * 12, "what never varies is not divided by 0"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_read_by_the_models_own_columns(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame([{**row, "comment": "nice", "id": i} for i, row in enumerate(TRAIN)])
    path = tmp_path / f"homes{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    model = UniversalModel(FeatureTransformer().eval(), adapter=fitted())
    data = load_data(path, model, batch_size=12)
    want = model.adapter.collate(TRAIN)
    assert all(torch.equal(data[0].kwargs[n], want.kwargs[n]) for n in ("x_num", "x_cat"))
    frame.drop(columns="rooms").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(DataError, match=r"LW-D31 less\.csv: There is no column 'rooms'.*city, area, heating"):
        load_data(tmp_path / "less.csv", model)


def test_numbers_written_as_text_are_numbers(tmp_path: Path) -> None:
    texts = [{name: str(value) for name, value in row.items()} for row in TRAIN]
    assert TabularModalityAdapter.fitted(FeatureTransformer(), texts, categorical=["heating"]).schema == fitted().schema


def test_the_schema_comes_back_from_the_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UniversalModel(perceptron().eval(), adapter=fitted(perceptron()))
    data = load_data(TRAIN, model)
    save_model(model, tmp_path / "saved")
    again = load_saved(tmp_path / "saved", module=perceptron())
    assert again.adapter == model.adapter
    assert again.domain == "tabular"
    assert torch.equal(again.predict(again.adapter.collate(TRAIN)), model.predict(data[0]))


def test_every_kind_of_network_is_ranked() -> None:
    torch.manual_seed(0)
    for module in (perceptron(), FeatureTransformer(), Described()):
        adapter = adapter_for(module) if isinstance(module, Described) else fitted(module)
        model = UniversalModel(module.eval(), adapter=adapter)
        report = analyze(model, load_data(TRAIN, model), ["fisher_information", "layer_ablation", "layer_correlation"])
        assert all(s.status is Status.OK for s in report.scores["fisher_information"].entries.values())
        assert any(s.status is Status.OK for s in report.scores["layer_ablation"].entries.values())


def test_who_claims_what() -> None:
    assert isinstance(load(Described()).adapter, TabularModalityAdapter)
    assert isinstance(load(FeatureTransformer()).adapter, TabularModalityAdapter)
    assert load(perceptron()).domain == "other", "a plain perceptron reads numbers as they are"
    with pytest.raises(DataError, match=r"LW-D31 row 0: Which columns.*fitted\(module, rows\).*city, area"):
        load(FeatureTransformer()).adapter.collate(TRAIN[:1])


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"area": float("nan")}, "LW-D33", "'area' holds nan"),
    ({"area": float("inf")}, "LW-D33", "'area' holds inf"),
    ({"area": None}, "LW-D32", "'area' is empty"),
    ({"area": "big"}, "LW-D32", "'area' holds 'big' (str)"),
    ({"area": [1.0]}, "LW-D32", "'area' holds [1.0] (list)"),
    ({"city": "Limo"}, "LW-D39", "'city' holds 'Limo', a category that the training rows did not have. Did you mean 'Lima'"),
    ({"city": ""}, "LW-D32", "'city' is empty"),
    ({"heating": 2}, "LW-D39", "'heating' holds '2'"),
    ({"heating": float("nan")}, "LW-D33", "'heating' holds nan"),
]


@pytest.mark.parametrize(("change", "code", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_rows_are_named(change: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        fitted().collate([TRAIN[0], Record(TRAIN[1] | change, "homes.csv, row 7")])
    assert caught.value.code == code
    assert text in str(caught.value)
    assert "homes.csv, row 7" in str(caught.value)


def test_a_schema_needs_whole_training_rows() -> None:
    with pytest.raises(DataError, match="LW-D29"):
        TabularModalityAdapter.fitted(perceptron(), [])
    with pytest.raises(DataError, match=r"LW-D32 row 2: 'area' is empty"):
        TabularModalityAdapter.fitted(perceptron(), [*TRAIN[:2], TRAIN[2] | {"area": None}])

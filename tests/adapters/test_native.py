"""The adapter of the native architecture, and what the library finds in a `VFTModel`: its four points, by data flow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerwise as lw
from layerwise.adapter import adapter_for
from layerwise.errors import DataError, UsageError
from layerwise.native import VFTModel
from layerwise.task import Classification, Fidelity, LanguageModelling

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2, "rank": 4, "max_positions": 32}


def model(**settings: Any) -> VFTModel:
    torch.manual_seed(0)
    made = VFTModel(**SMALL | settings).eval()
    for block in made.blocks:
        torch.nn.init.normal_(block.compensator.u)
    return made


def text(rows: int = 8) -> list[dict[str, Any]]:
    drawn = np.random.default_rng(0)
    return [{"input_ids": drawn.integers(0, 11, size=int(drawn.integers(3, 9))).tolist(), "label": i % 3} for i in range(rows)]


def test_each_model_gets_the_task_of_its_outputs() -> None:
    def task(settings: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
        made = lw.load(model(**settings))
        made.see(lw.load_data(rows, made)[0])
        return made.task

    frames = [{"frames": np.ones((4, 3)), "label": 0}, {"frames": np.ones((2, 3)), "label": 1}]
    assert isinstance(task({"vocab_size": 11, "causal": True}, text()), LanguageModelling)
    assert isinstance(task({"vocab_size": 11, "classes": 3}, text()), Classification)
    assert isinstance(task({"frame": 3, "classes": 2}, frames), Classification)
    assert task({"frame": 3}, [{"frames": np.ones((4, 3))}]) == Fidelity(kind="cosine")


def test_padding_of_every_kind_stands_in_one_mask() -> None:
    made = model(vocab_size=11, frame=3, image=(1, 4, 4, 2), classes=3)
    row = {"image": np.zeros((4, 4), np.uint8)}
    batch = adapter_for(made).collate(
        [row | {"input_ids": [1, 2], "frames": np.ones((3, 3))}, row | {"input_ids": [3], "frames": np.ones((1, 3))}]
    )
    assert batch.kwargs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 1, 0]]
    assert batch.kwargs["images"].shape == (2, 1, 4, 4)


def test_a_missing_modality_is_grey_or_padding() -> None:
    made = lw.load(model(vocab_size=11, frame=3, image=(1, 4, 4, 2), classes=3))
    row = {"image": np.arange(16, dtype=np.uint8).reshape(4, 4), "input_ids": [1, 2], "frames": np.ones((3, 3))}
    batch = made.adapter.collate([row, row])
    assert made.adapter.modalities == ("vision", "audio", "text")
    masks = {name: made.adapter.masked(batch, [name]).kwargs["attention_mask"][0].tolist() for name in made.adapter.modalities}
    assert masks == {"vision": [1] * 5, "audio": [0] * 3 + [1] * 2, "text": [1] * 3 + [0] * 2}
    for name in made.adapter.modalities:
        assert not torch.equal(made.predict(made.adapter.masked(batch, [name])), made.predict(batch))
    with pytest.raises(UsageError, match="reads no 'smell'"):
        made.adapter.masked(batch, ["smell"])
    with pytest.raises(UsageError, match="nothing can be left out"):
        adapter_for(model(vocab_size=11)).masked(batch, ["text"])


@pytest.mark.parametrize(
    ("row", "code"),
    [({"input_ids": [11]}, "LW-D39"), ({"input_ids": []}, "LW-D39"), ({"text": "hello"}, "LW-D32"), ({"image": 3}, "LW-D32")],
)
def test_a_row_that_cannot_be_read_is_named(row: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError, match=rf"{code}.*row 1"):
        adapter_for(model(vocab_size=11)).collate([{"input_ids": [1]}, row])


def test_frames_of_another_width_are_refused() -> None:
    with pytest.raises(DataError, match=r"time, 3"):
        adapter_for(model(frame=3)).collate([{"frames": np.ones((4, 2))}])


@pytest.mark.parametrize("settings", [{"vocab_size": 11, "causal": True}, {"image": (1, 4, 4, 2), "classes": 3}])
def test_the_four_points_of_a_block_are_its_sublayers(settings: dict[str, Any]) -> None:
    view = lw.load(model(**settings)).at("sublayer")
    first = [(x.name, x.kind) for x in view.layers if x.parent == "blocks.0"]
    assert first == [
        ("blocks.0.projector", "linear"),
        ("blocks.0.attention.core", "attention"),
        ("blocks.0.feed_forward", "mlp"),
        ("blocks.0.compensator", "mlp"),
    ]
    assert view.layers[0].parameters == 2 * 16 * 4
    assert view.notes == ()


def test_silencing_a_point_is_leaving_it_out() -> None:
    made = model(vocab_size=11, causal=True)
    view, block = lw.load(made).at("sublayer"), made.blocks[0]
    x = torch.randn(2, 5, 16)

    def left_out(name: str) -> torch.Tensor:
        with view.skipping([f"blocks.0.{name}"]), torch.no_grad():
            return block(x, is_causal=True)

    with torch.no_grad():
        a = block.attention(block.norm1(x), projector=block.projector, is_causal=True)
        h, h0 = block.norm2(x + a), block.norm2(x)

        def rest(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return block.feed_forward(h, projector=block.projector), block.compensator(h, projector=block.projector)

        f, c = rest(h)
        torch.testing.assert_close(left_out("attention.core"), x + sum(rest(h0)))
        torch.testing.assert_close(left_out("feed_forward"), x + a + c)
        torch.testing.assert_close(left_out("compensator"), x + a + f)
        silent = left_out("projector")  # nothing passes through the vein: what its biases give stays
        constant = block.feed_forward(h0, z=torch.zeros(2, 5, 4), projector=block.projector)
        torch.testing.assert_close(silent - x - block.compensator(h0, rate=torch.ones(2, 5), projector=block.projector), constant)


def test_heads_and_channels_are_found() -> None:
    loaded = lw.load(model(vocab_size=11, causal=True))
    assert [x.name for x in loaded.at("head").layers][:2] == ["blocks.0.attention.core:head0", "blocks.0.attention.core:head1"]
    channels = loaded.at("channel").layers
    assert len(channels) == 2 * 8
    assert {x.name.split(":")[0] for x in channels} == {"blocks.0.feed_forward.down", "blocks.1.feed_forward.down"}


def test_a_report_on_all_points_says_how_far_the_tokens_lie_off_the_vein() -> None:
    loaded = lw.load(model(vocab_size=11, classes=3))
    data = lw.load_data(text(), loaded, batch_size=4)
    report = lw.analyze(loaded, data, methods=["layer_ablation", "gradient_based", "weight_norm"], granularity="sublayer")
    assert len(report.layers) == 8
    assert all(len(report[m].usable()) == 8 for m in report.methods)
    (note,) = [n for n in report.notes if "off-plane" in n]
    measured = loaded.module.statistics(**data[0].kwargs)
    assert f"blocks.1 {float(measured[1].mean):.2f} ({float(measured[1].share):.0%})" in note


def test_it_is_saved_and_built_again_from_its_source(tmp_path: Path) -> None:
    loaded = lw.load(model(image=(1, 4, 4, 2), classes=3))
    from layerwise.saved import load_saved, save_model

    save_model(loaded, tmp_path / "m")
    again = load_saved(tmp_path / "m")
    assert type(again.module) is VFTModel
    assert torch.equal(again.predict(loaded.example), loaded.predict(loaded.example))
    assert again.adapter == loaded.adapter


def test_it_is_compressed_with_proofs() -> None:
    loaded = lw.load(model(vocab_size=11, classes=3))
    data = lw.load_data(text(16), loaded, batch_size=8)
    plan = lw.CompressionPlan((lw.Step("drop_layers", ("blocks.0",)),))
    result = lw.compress(loaded, plan, data)
    assert all(proof.passed for proof in result.proofs)
    (note,) = result.model.adapter.remarks(result.model.module, data[0])
    assert "blocks.1" in note
    assert "blocks.0" not in note


def test_it_is_loaded_by_a_spec() -> None:
    loaded = lw.load("py:layerwise.native:VFTModel?vocab_size=11&d_model=16&n_layers=2&n_heads=2&rank=4")
    assert [x.name for x in loaded.layers] == ["blocks.0", "blocks.1"]
    assert loaded.domain == "native"

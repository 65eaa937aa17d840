"""Images in every form, transformed as the model was trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from layerwise.adapter import adapter_for
from layerwise.adapters._image import Transform
from layerwise.adapters.vision import VisionModalityAdapter
from layerwise.errors import DataError, UserModelError
from layerwise.heads import EncoderWithHead
from layerwise.model import UniversalModel
from layerwise.task import Classification, Fidelity

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
PLAIN = Transform(size=(3, 8, 8), mean=(0.0,), std=(1.0,), crop=1.0)


def encoded(pixels: np.ndarray = PIXELS, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def digits_vit() -> nn.Module:
    shape: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "crop"), [(24, 0.875), (32, 0.95), (20, 1.0)])
@pytest.mark.parametrize("shape", [(37, 53, 3), (64, 40, 3), (20, 20, 3)])
def test_the_transform_is_timms(shape: tuple[int, ...], side: int, crop: float, interpolation: str, mode: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    settings: dict[str, Any] = {
        "interpolation": interpolation,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.4),
        "crop_mode": mode,
    }
    theirs = timm.data.create_transform((3, side, side), is_training=False, crop_pct=crop, **settings)(Image.fromarray(pixels))
    ours = Transform((3, side, side), settings["mean"], settings["std"], interpolation, crop, mode)(encoded(pixels), "row 0")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_every_form_of_an_image_gives_the_same(tmp_path: Path) -> None:
    content = encoded()
    (tmp_path / "a.png").write_bytes(content)
    forms = [content, str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(PIXELS), {"bytes": content, "path": None}]
    forms += [{"bytes": None, "path": str(tmp_path / "a.png")}]
    first = PLAIN(forms[0], "row 0")
    assert first.shape == (3, 8, 8)
    assert all(torch.equal(PLAIN(form, "row 0"), first) for form in forms[1:])


def test_arrays_in_every_layout() -> None:
    square = PIXELS[:8, :8]
    want = torch.from_numpy(square).permute(2, 0, 1).float() / 255
    forms = [
        square,
        square.transpose(2, 0, 1),
        torch.from_numpy(square.transpose(2, 0, 1).copy()),
        square.astype(np.float32) / 255,
    ]
    for form in [*forms, square.tolist()]:
        torch.testing.assert_close(PLAIN(form, "row 0"), want, rtol=0, atol=1e-6)
    grey = PLAIN(square[..., 0], "row 0")
    torch.testing.assert_close(grey, want[:1].expand(3, -1, -1), rtol=0, atol=1e-6)
    one = Transform(size=(1, 8, 8), mean=(0.5,), std=(0.5,), crop=1.0)
    torch.testing.assert_close(one(square, "row 0"), (want.mean(0, keepdim=True) - 0.5) / 0.5)
    assert PLAIN(PIXELS, "row 0").shape == (3, 8, 8)
    assert PLAIN(np.zeros((8, 8, 4), np.uint8), "row 0").shape == (3, 8, 8)


def test_the_size_and_channels_are_those_that_were_built() -> None:
    """timm's own description keeps 224 pixels and 3 channels, whatever the options."""
    adapter = adapter_for(digits_vit())
    assert isinstance(adapter, VisionModalityAdapter)
    assert adapter.transform.size == (1, 8, 8)
    batch = adapter.collate([{"image": np.full((8, 8), 0.75, np.float32), "label": 3}])
    assert batch.labels.tolist() == [3]
    torch.testing.assert_close(batch.args[0], torch.full((1, 1, 8, 8), 0.5))


def test_a_module_may_describe_its_images_itself() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert adapter_for(module).modality == "other"
    module.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}  # type: ignore[assignment]
    adapter = adapter_for(module)
    assert isinstance(adapter, VisionModalityAdapter)
    assert adapter.transform == Transform((3, 8, 8), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), crop=1.0)


def test_torchvision_gets_imagenets_settings() -> None:
    from torchvision.models import squeezenet1_1

    assert adapter_for(squeezenet1_1()).transform == Transform()  # type: ignore[attr-defined]


def test_transformers_settings_come_from_the_folder(tmp_path: Path) -> None:
    import transformers as tf

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    module = tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5))
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 16, "width": 16}, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "image_processor_type": "ViTImageProcessor"}))
    model = UniversalModel(module, adapter=adapter_for(module, tmp_path))
    batch = model.adapter.collate([{"image": encoded(), "label": 1}])
    assert model.predict(batch).shape == (1, 5)
    reference = tf.ViTImageProcessor(do_rescale=True, **settings)(Image.fromarray(PIXELS), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch.kwargs["pixel_values"], reference, rtol=0, atol=0.05)  # torchvision rounds elsewhere


def test_the_settings_survive_saving(tmp_path: Path) -> None:
    adapter = adapter_for(digits_vit())
    adapter.save(tmp_path)
    assert adapter_for(digits_vit(), tmp_path) == adapter


def test_tasks() -> None:
    model = UniversalModel(digits_vit())
    batch = model.adapter.collate([{"image": np.zeros((8, 8), np.float32), "label": 3}])
    model.see(batch)
    assert model.task == Classification()
    features = UniversalModel(timm.create_model("resnet10t", num_classes=0))
    assert features.adapter.fidelity(features.module) == Fidelity("cosine")
    headed = EncoderWithHead(features.module, 512, 3)
    assert adapter_for(headed).fidelity(headed) == Fidelity()


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STAGES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def detr() -> nn.Module:
    import transformers as tf

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2))}
    backbone = tf.ResNetConfig(**STAGES, out_features=["stage2"])
    more = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5}
    config = tf.DetrConfig(**sizes, **more, use_pretrained_backbone=False, use_timm_backbone=False, backbone_config=backbone)
    return tf.DetrForObjectDetection(config)


def yolos() -> nn.Module:
    import transformers as tf

    return tf.YolosForObjectDetection(tf.YolosConfig(**SMALL, image_size=[32, 32], patch_size=8, num_detection_tokens=5))


def segmenter() -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}  # smaller than what torchvision trains on, for the test's sake
    return model


@pytest.mark.parametrize(("build", "shape"), [(detr, (2, 5, 3)), (yolos, (2, 5, 3)), (segmenter, (2, 4, 64, 64))])
def test_detectors_and_segmenters_give_one_answer_per_query_or_pixel(build: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = UniversalModel(build().eval())
    assert model.domain == "vision"
    output = model.predict(model.example)
    assert output.shape == shape
    loss, _ = model.adapter.fidelity(model.module).losses(output, model.example, output)
    assert float(loss.abs().max()) == 0


def test_boxes_after_suppression_are_refused() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    module = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    module.pretrained_cfg = {"input_size": (3, 64, 64)}
    with pytest.raises(UserModelError, match=r"LW-U78.*left after suppression"):
        UniversalModel(module).predict(UniversalModel(module).example)


def test_a_row_without_an_image_is_named() -> None:
    with pytest.raises(DataError, match=r"LW-D32 row 0: The row has no image.*Its columns: text"):
        adapter_for(digits_vit()).collate([{"text": "a"}])

"""Images for timm, torchvision and Hugging Face models, and for any module that carries a ``pretrained_cfg``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.adapter import ADAPTERS, ModalityAdapter, library_of
from layerwise.adapters._image import Transform
from layerwise.adapters._labels import labels_of
from layerwise.adapters._settings import json_file, processor
from layerwise.data import Batch, Row
from layerwise.errors import DataError, UserModelError
from layerwise.heads import EncoderWithHead, encoder_of
from layerwise.hugging import is_bare, modalities
from layerwise.rows import place_of
from layerwise.task import Fidelity, Task

SETTINGS = "preprocessing.json"  # ours; transformers' own is preprocessor_config.json
PILLOW_NAMES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by the numbers that transformers writes


@ADAPTERS.register("vision")
@dataclass(frozen=True)
class VisionModalityAdapter(ModalityAdapter):
    """Decodes, resizes, crops and scales as the model was trained; `argument` names the forward's keyword ('' = the first)."""

    transform: Transform = field(default_factory=Transform)
    argument: str = ""
    modality: ClassVar[str] = "vision"
    priority: ClassVar[int] = 10

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        inner = encoder_of(module)
        libraries = library_of(inner)
        if "transformers" in libraries:
            return getattr(inner, "main_input_name", "") == "pixel_values" and modalities(inner) == ("image",)
        return bool(libraries & {"timm", "torchvision"}) or bool(_described(inner))

    @classmethod
    def of(cls, module: nn.Module, folder: Path | None = None) -> VisionModalityAdapter:
        inner = encoder_of(module)
        argument = "pixel_values" if "transformers" in library_of(inner) else ""
        saved = json_file(folder / SETTINGS) if folder else {}
        if saved:
            return cls(from_json(saved), argument)
        hugging = from_processor(processor(folder, "image_processor")) if argument else None
        return cls(_fitting(hugging or from_cfg(_described(inner)), inner), argument)

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Images (samples, channels, height, width) and labels (samples,)."""
        images = torch.stack([self.transform(_image(row, i), place_of(row, i)) for i, row in enumerate(rows)])
        labels = labels_of(rows)
        return Batch((), {self.argument: images}, labels) if self.argument else Batch((images,), {}, labels)

    def example(self, module: nn.Module) -> Batch:
        """Two images of noise, the same each time."""
        images = torch.randn(2, *self.transform.size, generator=torch.Generator().manual_seed(0))
        return Batch((), {self.argument: images}) if self.argument else Batch((images,))

    def output(self, raw: Any) -> Tensor:
        """Raises `UserModelError` LW-U78 for detectors that answer with a list of boxes per image: no row is a sample."""
        if isinstance(raw, list) and raw and all(isinstance(found, Mapping) and "boxes" in found for found in raw):
            what = "The forward gave the boxes that are left after suppression, a different number for each image."
            remedy = "Wrap the detector so that it gives (logits, boxes) of every query or anchor, or analyze its backbone."
            raise UserModelError(what, remedy=remedy, code="LW-U78")
        return super().output(raw)

    def default_task(self, module: nn.Module, batch: Batch, output: Tensor) -> Task:
        return self.fidelity(module) if _embeds(module) else super().default_task(module, batch, output)

    def fidelity(self, module: nn.Module) -> Fidelity:
        return Fidelity(kind="cosine") if _embeds(module) else Fidelity()

    def save(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(asdict(self.transform), indent=1) + "\n")


def _image(row: Row, position: int) -> Any:
    value = row.get("image", row.get("x"))
    if value is None:
        columns = f"Its columns: {', '.join(map(str, row))}."
        remedy = f"Name the image column (columns={{'image': …}}). {columns}"
        raise DataError("The row has no image.", place=place_of(row, position), remedy=remedy, code="LW-D32")
    return value


def _described(module: nn.Module) -> Mapping[str, Any]:
    """The module's own word on its input, in timm's form; a factory may set it on any module."""
    for name in ("pretrained_cfg", "default_cfg"):
        found = getattr(module, name, None)
        if isinstance(found, Mapping) and "input_size" in found:
            return found
    return {}


def from_cfg(cfg: Mapping[str, Any]) -> Transform:
    plain = Transform()
    if not cfg:
        return plain
    return Transform(
        size=tuple(cfg["input_size"]),
        mean=tuple(cfg.get("mean") or plain.mean),
        std=tuple(cfg.get("std") or plain.std),
        interpolation=str(cfg.get("interpolation") or plain.interpolation),
        crop=float(cfg.get("crop_pct") or 1.0),
        mode=str(cfg.get("crop_mode") or plain.mode),
    )


def from_json(saved: Mapping[str, Any]) -> Transform:
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    return Transform(**settings)


def from_processor(saved: Mapping[str, Any]) -> Transform | None:
    """transformers' settings: a size in height and width squashes; a shortest edge with a crop keeps the middle."""
    if not saved or "image_mean" not in saved:
        return None
    size, crop = _sides(saved.get("size", 224)), _sides(saved.get("crop_size", saved.get("size", 224)))
    cropped = bool(saved.get("do_center_crop"))
    side = crop if cropped else size
    return Transform(
        size=(3, *side),
        mean=tuple(saved["image_mean"]),
        std=tuple(saved["image_std"]),
        interpolation=PILLOW_NAMES[int(saved.get("resample", 3))],
        crop=side[0] / size[0] if cropped else 1.0,
        mode="center" if cropped else "squash",
    )


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge", size.get("longest_edge", 224))
        return int(size.get("height", edge)), int(size.get("width", edge))
    return int(size), int(size)


def _fitting(transform: Transform, module: Any) -> Transform:
    """With the channels and the size that the module was really built with: timm's description keeps the original ones."""
    stem = dict(module.named_modules()).get(str(_described(module).get("first_conv")))
    convolution = next((m for m in (stem, *module.modules()) if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None else transform.size[0]
    built = getattr(getattr(module, "patch_embed", None), "img_size", None)  # timm's vision transformers
    configured = getattr(getattr(module, "config", None), "image_size", None)  # transformers
    side = built or configured or transform.size[1:]
    height, width = side if isinstance(side, Sequence) else (side, side)
    return replace(transform, size=(int(channels), int(height), int(width)))


def _embeds(module: nn.Module) -> bool:
    """Whether it gives features and no logits."""
    if isinstance(module, EncoderWithHead):
        return False
    return is_bare(module) if "transformers" in library_of(module) else getattr(module, "num_classes", None) == 0

"""Images in every form that data sets use, to one tensor: decode, resize, crop, scale."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import DataError, DataShardError, missing_dependency

MAX_PIXELS = 80_000_000  # of one image: 240 MB of memory once decoded; Pillow's own limit is a little higher
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # those that need no foreign program
CHANNELS = (1, 3, 4)
SMALLER = "Leave it out or scale it down."


@dataclass(frozen=True)
class Transform:
    """The evaluation transform: channels, height and width wanted, then scaling by `mean` and `std` of values 0 … 1.

    `crop`: share of the resized image's side that is kept; `mode` center (short side resized, middle kept), squash (both sides
    resized) or border (long side resized, the rest filled with `mean`). As in timm.
    """

    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 0.875
    mode: str = "center"

    def __call__(self, value: Any, place: str) -> Tensor:
        """(channels, height, width) float32. Raises `DataError` LW-D38, LW-D33, LW-D32 or `DataShardError`, naming `place`."""
        image = self._array(value, place) if isinstance(value, np.ndarray | Tensor | list) else self._decoded(value, place)
        channels = self.size[0]
        mean, std = (torch.tensor(_fitted(v, channels))[:, None, None] for v in (self.mean, self.std))
        return (image - mean) / std

    def _decoded(self, value: Any, place: str) -> Tensor:
        """Of an encoded image, a path or a PIL image: values 0 … 1."""
        image = _opened(value, place)
        try:
            image = image.convert("L" if self.size[0] == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError for broken PNG chunks
            raise _damaged(place, error) from error
        array = np.array(self._cropped(image))
        return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).float() / 255

    def _cropped(self, image: Any) -> Any:
        from PIL import Image

        _, height, width = self.size
        if image.size == (width, height) and self.crop == 1.0:
            return image
        scaled = (int(height / self.crop), int(width / self.crop))
        method = Image.Resampling[self.interpolation.upper()]
        image = image.resize(self._resized(image.size, scaled), method)
        left, top = _middle(image.size[0], width), _middle(image.size[1], height)
        filler = tuple(round(255 * v) for v in _fitted(self.mean, len(image.getbands())))
        canvas = Image.new(
            image.mode, (width, height), (filler if len(filler) > 1 else filler[0]) if self.mode == "border" else 0
        )
        canvas.paste(image, (-left, -top))
        return canvas

    def _resized(self, size: tuple[int, int], scaled: tuple[int, int]) -> tuple[int, int]:
        """Width and height before the crop."""
        (width, height), (h, w) = size, scaled
        if self.mode == "squash":
            return w, h
        ratio = (max if self.mode == "border" else min)(width / w, height / h)
        if self.mode == "border" or h != w:
            return round(width / ratio), round(height / ratio)
        return (w, int(h * height / width)) if width <= height else (int(w * width / height), h)

    def _array(self, value: Any, place: str) -> Tensor:
        """Of numbers: bytes are scaled to 0 … 1, floats are taken as they are, and stretched to the wanted size."""
        image = _channels_first(value, place)
        if not image.is_floating_point():
            image = image.float() / 255
        if not bool(image.isfinite().all()):
            raise DataError("The image holds NaN or infinity.", place=place, remedy="Mend or leave out the row.", code="LW-D33")
        image = _recoloured(image.float(), self.size[0])
        if image.shape[1:] != self.size[1:]:
            image = F.interpolate(image[None], self.size[1:], mode="bilinear", antialias=True)[0]
        return image


def _opened(value: Any, place: str) -> Any:
    """A PIL image whose header was read and whose size is sane; its pixels are not decoded yet."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_dependency("pillow", "vision", "Reading images") from error
    if isinstance(value, dict):  # as Hugging Face data sets keep them
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        image = value
    elif isinstance(value, bytes | str | Path):
        image = _header(Image, io.BytesIO(value if isinstance(value, bytes) else _content(value, place)), place)
    else:
        what = f"The image came as {type(value).__name__}."
        raise DataError(what, place=place, remedy="Give JPEG or PNG bytes, a path, an array or a PIL image.", code="LW-D32")
    check_size(*image.size, place)
    return image


def _content(path: str | Path, place: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        what = f"The image {str(path)!r} cannot be read: {error.strerror}."
        raise DataError(what, place=place, remedy="Check the path and its permissions.", code="LW-D32") from error


def _header(library: Any, source: io.BytesIO, place: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", library.DecompressionBombWarning)
            return library.open(source, formats=FORMATS)
    except (library.DecompressionBombError, library.DecompressionBombWarning) as error:
        raise DataError(f"The image is too large: {error}", place=place, remedy=SMALLER, code="LW-D38") from error
    except library.UnidentifiedImageError as error:
        if _is_empty_png(source.getvalue()):  # Pillow does not count it as an image
            check_size(0, 0, place)
        raise _damaged(place, f"it is none of {', '.join(FORMATS)}, or its header is broken") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(place, error) from error


def _is_empty_png(content: bytes) -> bool:
    """Whether the header says a width or a height of 0."""
    return content.startswith(b"\x89PNG") and b"\0\0\0\0" in (content[16:20], content[20:24])


def check_size(width: int, height: int, place: str) -> None:
    """Raises `DataError` LW-D38 for an image without pixels or with more than 100 million."""
    if not 0 < width * height <= MAX_PIXELS:
        what = f"The image is {width}×{height} pixels; 1 to {MAX_PIXELS:,} pixels are read."
        raise DataError(what, place=place, remedy=SMALLER, code="LW-D38")


def _damaged(place: str, error: Exception | str) -> DataShardError:
    return DataShardError(f"The image cannot be decoded: {error}", place=place, remedy="Copy it again or leave it out.")


def _channels_first(value: Any, place: str) -> Tensor:
    """(channels, height, width) of an array (height, width) or with channels first or last."""
    first = isinstance(value, Tensor)  # torch's own layout
    image = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3:
        what = f"The image is an array of shape {tuple(image.shape)}."
        raise DataError(what, place=place, remedy="Give (height, width) or three dimensions with channels.", code="LW-D32")
    if 0 in image.shape:
        check_size(0, 0, place)
    if image.shape[2] in CHANNELS and not (image.shape[0] in CHANNELS and (first or image.shape[0] < image.shape[2])):
        image = image.permute(2, 0, 1)
    check_size(image.shape[2], image.shape[1], place)
    return image


def _recoloured(image: Tensor, channels: int) -> Tensor:
    if image.shape[0] == channels:
        return image
    if image.shape[0] == 4:  # the last channel is transparency
        image = image[:3]
    grey = image.mean(0, keepdim=True)
    return image if image.shape[0] == channels else grey.expand(channels, -1, -1)


def _fitted(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number per channel: as given, or their average where the model reads another number of channels."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _middle(have: int, want: int) -> int:
    return round((have - want) / 2.0)

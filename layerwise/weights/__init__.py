"""Weights in files: read, streamed, checked, put into a module, saved. Nothing is ever unpickled.

Decision: a file is known by its content, not by its name, and its claims (sizes, counts, offsets) are checked against its
size before anything is allocated for them. Every refusal is a `ModelFormatError` whose code says which kind it is
(``LW-M43`` an empty file … ``LW-M72`` ONNX data past the end of its file) and whose text says how to mend it.
"""

from __future__ import annotations

from layerwise.weights.finite import check_finite
from layerwise.weights.load import load_into
from layerwise.weights.read import describe_weights, read_weights, stream_weights
from layerwise.weights.save import save_weights

__all__ = ["check_finite", "describe_weights", "load_into", "read_weights", "save_weights", "stream_weights"]

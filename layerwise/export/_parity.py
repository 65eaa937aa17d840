"""An ONNX file against torch: run by onnxruntime on batches of other sizes than the export's; the first layer that is off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.artifact import Parity
from layerwise.data import Batch
from layerwise.errors import ExportMismatch
from layerwise.export._graph import missing_data, with_outputs
from layerwise.export._inputs import Inputs
from layerwise.model import UniversalModel
from layerwise.proofs import relative_error

# Largest difference relative to the largest output. float32: 6e-8 per operation, summed in another order. float16: 5e-4 per
# operation. bfloat16: 4e-3, and torch rounds where onnxruntime does not. int8: at least this, or twice the noise that its own
# rounding makes in this model; the sharp check is that of the graph without rounding.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 5e-2}


def other_sizes(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, and one sample alone: none of them has the two samples that the export was made on."""
    single = batches[0].narrow(0, 1)
    return [single, *(b if b.size != 2 else b.narrow(1, 2) for b in batches)]


def compared(
    model: UniversalModel, path: Path, inputs: Inputs, batches: Sequence[Batch], bound: float, places: Mapping[str, str]
) -> Parity:
    """Runs `path` in onnxruntime on `batches`. Raises `ExportMismatch` (LW-V21) naming the first layer that is further off."""
    opened = session(path)
    absolute = relative = 0.0
    for batch in batches:
        found, wanted = run(opened, inputs, batch)[0], model.predict(batch)
        off = relative_error(found, wanted)
        if not off <= bound:
            layer = first_diverging(model, path, inputs, batch, bound, places)
            gap = float((found.double() - wanted.double()).abs().max()) if found.shape == wanted.shape else float("inf")
            raise ExportMismatch(
                f"onnxruntime gives other outputs than torch: largest difference {gap:.3g}, relative {off:.3g}, bound {bound:g}; "
                f"the first layer that diverges is {layer}.",
                place=layer,
                remedy="Nothing was written under the final name.",
            )
        relative, absolute = max(relative, off), max(absolute, float((found.double() - wanted.double()).abs().max()))
    return Parity(absolute, relative, bound, sum(b.size for b in batches))


def first_diverging(
    model: UniversalModel, path: Path, inputs: Inputs, batch: Batch, bound: float, places: Mapping[str, str]
) -> str:
    """The first layer whose output differs by more than `bound`, by a copy of the graph that gives every layer's output."""
    probe = path.with_name(f"probe-{path.name}")
    with removed(probe):
        names = with_outputs(path, probe, places)
        found = dict(zip(names, run(session(probe), inputs, batch)[1:], strict=True))
    with model.capture(names) as wanted:
        model.predict(batch)
    for name in names:
        if found[name].shape == wanted[name][1].shape and not relative_error(found[name], wanted[name][1]) <= bound:
            return name
    return "after the last layer"


def session(path: Path, *, optimized: bool = True) -> Any:
    """onnxruntime on the CPU with torch's number of threads; not `optimized`, each node is computed as it stands in the file."""
    import onnxruntime

    if absent := missing_data(path):
        tensor, file = absent
        what = f"The weights of {tensor} are to be in {file}, which is not there."
        raise ExportMismatch(what, place=tensor, remedy="Keep both files in one folder.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of every constant that it folds away
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ExportMismatch(f"onnxruntime refuses the exported graph: {reason(error)}") from error


def fed(opened: Any, inputs: Inputs, batch: Batch) -> dict[str, Any]:
    """The arrays that the graph takes of `batch`; what it does not read is no input of it."""
    taken = {i.name for i in opened.get_inputs()}
    return {name: value.cpu().numpy() for name, value in inputs.values(batch).items() if name in taken}


def run(opened: Any, inputs: Inputs, batch: Batch) -> list[Tensor]:
    """All outputs of the graph on `batch`."""
    feed = fed(opened, inputs, batch)
    try:
        return [torch.from_numpy(array) for array in opened.run(None, feed)]
    except Exception as error:
        shapes = {name: value.shape for name, value in feed.items()}
        raise ExportMismatch(f"onnxruntime cannot run inputs of the shapes {shapes}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The innermost cause: the exporter wraps it in advice on how to report bugs."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def removed(probe: Path) -> Iterator[None]:
    """A file to look at, and what lies beside it: gone after the block."""
    try:
        yield
    finally:
        for file in probe.parent.glob(f"{probe.name}*"):
            file.unlink()

"""ONNX by ``torch.onnx.export(dynamo=True)``, run by onnxruntime on other batch sizes than the export's.

What onnxruntime does with smaller numbers (1.31, CPU): it computes in float16, so such a model is exported as it is. It has no
kernels for bfloat16 products: weights stay bfloat16 in the file and are widened while it runs, the arithmetic is float32.
torchao's 8-bit products become MatMulInteger, with 8-bit weights in the file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.artifact import EXPORTERS, Exporter, Parity, Written
from layerwise.data import Batch, Data
from layerwise.errors import ExportMismatch, UserModelError, missing_dependency
from layerwise.export._graph import layer_outputs, widen_bfloat16, with_outputs, without_traces
from layerwise.export._inputs import Inputs, NamedForward
from layerwise.export._int8 import compact, unrounded, without_rounding
from layerwise.model import UniversalModel
from layerwise.packed import PackedWeight, floats_
from layerwise.proofs import relative_error
from layerwise.quiet import silence_import_noise
from layerwise.tensors import byte_size, wraps
from layerwise.trace import evaluating

ONE_FILE = 2_000_000_000  # bytes; a protobuf message cannot be larger than 2 GiB
BATCHES = 4
# Largest difference relative to the largest output. float32: 6e-8 per operation, summed in another order. float16: 5e-4 per
# operation. bfloat16: 4e-3, and torch rounds where onnxruntime does not. int8: at least this, or twice the noise that its own
# rounding makes in this model (see `own_noise`); the sharp check is that of `eight_bits`.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 5e-2}


@EXPORTERS.register("onnx")
@dataclass(frozen=True)
class OnnxExporter(Exporter):
    """One file below 2 GB, with a dynamic batch dimension and, where the model allows it, dynamic numbers of tokens."""

    suffix: ClassVar[str] = ".onnx"
    format: ClassVar[str] = "onnx"

    def write(self, model: UniversalModel, path: Path, data: Data) -> Written:
        runtime = _packages()
        here = model if model.device.type == "cpu" else model.changed(model.clone().module.cpu(), source=model.source)
        here, notes = unpacked(here)
        batches = list(islice(data, BATCHES))
        numbers = arithmetic(here)
        program, inputs = exported(here, batches)
        places = layer_outputs(program.model, [layer.name for layer in here.layers if layer.stream is not None])
        notes += [*widen_bfloat16(program.model), *without_traces(program.model), *fixed_axes(program.model)]
        save(program, path, byte_size(here.module))
        sizes = other_sizes(batches)
        bound = BOUNDS[numbers]
        if numbers == "int8":
            notes += eight_bits(here, path, inputs, sizes, places)
            bound = max(bound, 2 * own_noise(here, sizes))
        parity = compared(here, path, inputs, sizes, bound, places)
        return Written(parity, f"onnxruntime {runtime.__version__}", tuple(notes))


def unpacked(model: UniversalModel) -> tuple[UniversalModel, list[str]]:
    """The model with floats in the place of packed weights, which no operator of ONNX reads, and a note that says so."""
    if not any(isinstance(p, PackedWeight) for p in model.module.parameters()):
        return model, []
    floats = model.clone()
    count = floats_(floats.module)
    return floats, [f"{count} packed weights are written as the floats that they stand for: the file is as large as before"]


def arithmetic(model: UniversalModel) -> str:
    """The coarsest kind of number in the weights: int8, bfloat16, float16 or float32."""
    parameters = list(model.module.parameters())
    if any(wraps(p) for p in parameters):
        return "int8"
    kinds = {str(p.dtype).removeprefix("torch.") for p in parameters}
    return next((kind for kind in ("bfloat16", "float16") if kind in kinds), "float32")


def exported(model: UniversalModel, batches: Sequence[Batch]) -> tuple[Any, Inputs]:
    """torch's ONNX program made on two samples, and how to feed it. Raises `UserModelError` LW-U79 with what ONNX lacks."""
    if batches[0].layout is not None:
        what = f"{model.name} reads graphs, whose tensors have no row per sample: export to ONNX is not offered for them."
        raise UserModelError(what, remedy="Save the model folder instead.", code="LW-U79")
    batch = _pair(batches[0])
    inputs = Inputs.of(model.module, batch)
    for other in batches:
        inputs.values(other)
    values = inputs.values(batch)
    forward = NamedForward(model.module, inputs, batch, model.read)
    with evaluating(model.module), compact(model.module), torch.no_grad(), _quiet():
        forward.eval()
        try:
            program = torch.onnx.export(
                forward,
                tuple(values.values()),
                dynamo=True,
                dynamic_shapes=_axes(values),
                custom_translation_table=_translations(),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter lets through whatever the model's own code raises under tracing
            raise UserModelError(
                f"torch.onnx cannot export {model.name}: {_reason(error)}",
                remedy="Replace the operation it names, or register one for ONNX.",
                code="LW-U79",
            ) from error
    return program, inputs


def _pair(batch: Batch) -> Batch:
    """Two samples: a batch of one would be taken for a constant."""
    size = batch.size
    if size >= 2:
        return batch.narrow(0, 2)
    return batch.map(lambda t: torch.cat([t, t]) if t.dim() and len(t) == size else t)


def _axes(values: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """The first axis is the batch; the second of whole numbers (tokens) is the length, if the model does not fix it."""
    batch = torch.export.Dim("batch", min=1)
    axes: dict[str, dict[int, Any]] = {}
    for name, tensor in values.items():
        axes[name] = {0: batch} if tensor.dim() else {}
        if tensor.dim() == 2 and not tensor.is_floating_point():
            axes[name][1] = torch.export.Dim.AUTO
    return axes


def _translations() -> dict[Any, Any]:
    """Operators that torch's exporter does not know: the product of 8-bit matrices (torchao)."""
    from onnxscript import opset18

    def int_mm(a: Any, b: Any) -> Any:
        return opset18.MatMulInteger(a, b)

    return {torch.ops.aten._int_mm.default: int_mm}


def save(program: Any, path: Path, size: int) -> None:
    """Writes the graph; beyond 2 GB the weights go into a file beside it."""
    program.save(path, external_data=size > ONE_FILE)


def other_sizes(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, and one sample alone: none of them has the two samples that the export was made on."""
    single = batches[0].narrow(0, 1)
    return [single, *(b if b.size != 2 else b.narrow(1, 2) for b in batches)]


def compared(
    model: UniversalModel, path: Path, inputs: Inputs, batches: Sequence[Batch], bound: float, places: Mapping[str, str]
) -> Parity:
    """Runs `path` in onnxruntime on `batches`. Raises `ExportMismatch` (LW-V21) naming the first layer that is further off."""
    session = _session(path)
    absolute = relative = 0.0
    for batch in batches:
        found, wanted = _run(session, inputs, batch)[0], model.predict(batch)
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


def eight_bits(
    model: UniversalModel, path: Path, inputs: Inputs, batches: Sequence[Batch], places: Mapping[str, str]
) -> list[str]:
    """Compares a copy of the graph without roundings with torch without them, by the bound of what remains; gives notes."""
    probe = path.with_name(f"unrounded-{path.name}")
    with _removed(probe):
        if not without_rounding(path, probe):
            return ["its 8-bit products are of an unknown form, and were compared as they are only"]
        kinds = {str(p.dtype).removeprefix("torch.") for p in model.module.parameters() if not wraps(p)}
        bound = max((BOUNDS[k] for k in kinds if k in BOUNDS), default=BOUNDS["float32"])
        with unrounded(model.module):
            parity = compared(model, probe, inputs, batches, bound, places)
    return [
        "its 8-bit products are MatMulInteger: bytes shrink, a speed-up is not promised",
        f"without the rounding of activations the largest relative difference is {parity.relative:.2g} (bound {bound:g})",
    ]


def own_noise(model: UniversalModel, batches: Sequence[Batch]) -> float:
    """How far the rounding of activations moves torch's own outputs, relative to the largest."""
    noise = 0.0
    for batch in batches:
        with unrounded(model.module):
            smooth = model.predict(batch)
        noise = max(noise, relative_error(model.predict(batch), smooth))
    return noise


def first_diverging(
    model: UniversalModel, path: Path, inputs: Inputs, batch: Batch, bound: float, places: Mapping[str, str]
) -> str:
    """The first layer whose output differs by more than `bound`, by a copy of the graph that gives every layer's output."""
    probe = path.with_name(f"probe-{path.name}")
    with _removed(probe):
        names = with_outputs(path, probe, places)
        found = dict(zip(names, _run(_session(probe), inputs, batch)[1:], strict=True))
    with model.capture(names) as wanted:
        model.predict(batch)
    for name in names:
        if found[name].shape == wanted[name][1].shape and not relative_error(found[name], wanted[name][1]) <= bound:
            return name
    return "after the last layer"


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of every constant that it folds away
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ExportMismatch(f"onnxruntime refuses the exported graph: {_reason(error)}") from error


def _run(session: Any, inputs: Inputs, batch: Batch) -> list[Tensor]:
    taken = {i.name for i in session.get_inputs()}  # what the graph does not read is no input of it
    feed = {name: value.cpu().numpy() for name, value in inputs.values(batch).items() if name in taken}
    try:
        return [torch.from_numpy(array) for array in session.run(None, feed)]
    except Exception as error:
        shapes = {name: value.shape for name, value in feed.items()}
        raise ExportMismatch(f"onnxruntime cannot run inputs of the shapes {shapes}: {_reason(error)}") from error


def fixed_axes(graph: Any) -> list[str]:
    """A note for every axis of tokens that the model fixes."""
    shapes = {value.name: list(value.shape) for value in graph.graph.inputs}
    return [
        f"the input {name} takes {shape[1]} tokens per sample, no more and no fewer"
        for name, shape in shapes.items()
        if len(shape) == 2 and isinstance(shape[1], int) and not _floating(graph, name)
    ]


def _floating(graph: Any, name: str) -> bool:
    return next(v for v in graph.graph.inputs if v.name == name).dtype.is_floating_point()


def _reason(error: BaseException) -> str:
    """The innermost cause: the exporter wraps it in advice on how to report bugs."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _packages() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter imports it by itself, with a less helpful error
    except ImportError as error:
        raise missing_dependency(error.name or "onnx", "onnx", "Exporting to ONNX") from error
    return onnxruntime


@contextmanager
def _removed(probe: Path) -> Iterator[None]:
    """A file to look at, and what lies beside it: gone after the block."""
    try:
        yield
    finally:
        for file in probe.parent.glob(f"{probe.name}*"):
            file.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's talk with its own developers: constants it could not fold (they are computed at run time instead), names
    of axes that turned out equal. What matters is found by running the result."""
    silence_import_noise()
    folding = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = folding.level
    folding.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        folding.setLevel(level)

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
from layerwise.errors import UsageError, UserModelError, missing_dependency
from layerwise.export._eight_bit import Rounded, make, prove
from layerwise.export._graph import layer_outputs, name_nodes, widen_bfloat16, without_traces
from layerwise.export._inputs import Inputs, NamedForward
from layerwise.export._int8 import compact, unrounded, without_rounding
from layerwise.export._parity import BOUNDS, compared, other_sizes, reason, removed
from layerwise.export._quantize import check
from layerwise.lowbit.floats import STORED, floats_
from layerwise.model import UniversalModel
from layerwise.proofs import relative_error
from layerwise.quiet import silence_import_noise
from layerwise.tensors import byte_size, wraps
from layerwise.trace import evaluating

ONE_FILE = 2_000_000_000  # bytes; a protobuf message cannot be larger than 2 GiB
BATCHES = 4


@EXPORTERS.register("onnx")
@dataclass(frozen=True)
class OnnxExporter(Exporter):
    """One file below 2 GB, with a dynamic batch dimension and, where the model allows it, dynamic numbers of tokens.

    `quantize`: ``static``, ``dynamic`` or ``auto`` for 8-bit nodes (see docs/onnx.md); `keep`: a regular expression, the layers
    in whose dotted paths it is found stay float.
    """

    suffix: ClassVar[str] = ".onnx"
    format: ClassVar[str] = "onnx"

    quantize: str = ""
    keep: str = ""

    def __post_init__(self) -> None:
        check(self.quantize, self.keep)

    def write(self, model: UniversalModel, path: Path, data: Data, calibration: Data) -> Written:
        runtime = _packages()
        here = model if model.device.type == "cpu" else model.changed(model.clone().module.cpu(), source=model.source)
        here, notes = unpacked(here)
        self._check(here)
        batches = list(islice(data, BATCHES))
        program, inputs = exported(here, batches)
        places = layer_outputs(program.model, [layer.name for layer in here.layers if layer.stream is not None])
        name_nodes(program.model, dict(here.module.named_modules()))
        notes += [*widen_bfloat16(program.model), *without_traces(program.model), *fixed_axes(program.model)]
        version, size = f"onnxruntime {runtime.__version__}", byte_size(here.module)
        if not self.quantize:
            save(program, path, size)
            parity = proved(here, path, inputs, other_sizes(batches), places, notes)
            return Written(parity, version, tuple(notes))
        reference = path.with_name(f"float-{path.name}")
        with removed(reference), removed(path.with_name(f"split-{reference.name}")):
            save(program, reference, size)
            compared(here, reference, inputs, other_sizes(batches), BOUNDS["float32"], places)
            rounded = Rounded(self.quantize, self.keep, calibration, data)
            same, choice = make(reference, path, inputs, rounded)
            found = prove(here, same, path, choice, inputs, rounded, batches, places)
        return Written(found.parity, version, (*notes, *found.notes), found.figures)

    def _check(self, model: UniversalModel) -> None:
        """Raises `UsageError` for a model that cannot be quantized."""
        if self.quantize and (numbers := arithmetic(model)) != "float32":
            what = f"8-bit nodes are made of float32 weights, and those of {model.name} are {numbers}."
            raise UsageError(what, place="quantize", remedy="Leave out quantize, or export the model before that step.")
        if self.quantize and byte_size(model.module) > ONE_FILE:
            what = f"The weights of {model.name} do not fit into one file of 2 GB, which quantizing needs."
            raise UsageError(what, place="quantize", remedy="Leave out quantize.")


def proved(
    model: UniversalModel, path: Path, inputs: Inputs, sizes: Sequence[Batch], places: Mapping[str, str], notes: list[str]
) -> Parity:
    """Compares the file with torch by the bound of the model's numbers; adds what there is to say to `notes`."""
    numbers = arithmetic(model)
    bound = BOUNDS[numbers]
    if numbers == "int8":
        notes += eight_bits(model, path, inputs, sizes, places)
        bound = max(bound, 2 * own_noise(model, sizes))
    return compared(model, path, inputs, sizes, bound, places)


def unpacked(model: UniversalModel) -> tuple[UniversalModel, list[str]]:
    """The model with floats in the place of packed weights, which no operator of ONNX reads, and a note that says so."""
    if not any(isinstance(p, STORED) for p in model.module.parameters()):
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
                f"torch.onnx cannot export {model.name}: {reason(error)}",
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


def eight_bits(
    model: UniversalModel, path: Path, inputs: Inputs, batches: Sequence[Batch], places: Mapping[str, str]
) -> list[str]:
    """Compares a copy of the graph without roundings with torch without them, by the bound of what remains; gives notes."""
    probe = path.with_name(f"unrounded-{path.name}")
    with removed(probe):
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


def _packages() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter imports it by itself, with a less helpful error
    except ImportError as error:
        raise missing_dependency(error.name or "onnx", "onnx", "Exporting to ONNX") from error
    return onnxruntime


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

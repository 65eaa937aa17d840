"""Methods that read weights only, one tensor at a time: of a model, or of a file whose class nobody needs to know.

Decision: such a method says what one tensor contributes (`WeightAnalyzer.summarize`, a few numbers) and how a layer's
contributions become its score (`combine`). One driver goes over a model's layers, the other over the tensors of a file, which
it holds one at a time; both call the same two functions, so the scores are the same. Nothing here makes a copy of a whole
tensor: sums run in float64 over blocks of `BLOCK` values.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.analyzer import ImportanceAnalyzer
from layerwise.errors import ModelError, UsageError
from layerwise.importance import ImportanceReport, LayerInfo
from layerwise.model import UniversalModel
from layerwise.scores import LayerScore, Scores
from layerwise.tensors import dense
from layerwise.weights import describe_weights, stream_weights
from layerwise.weights.grouping import is_parameter, layers_of
from layerwise.weights.problems import listed

BLOCK = 1 << 20  # values in float64 at a time: 8 MiB
SCHEME = "weights:"


class WeightAnalyzer(ImportanceAnalyzer):
    """A method that needs neither data nor a class. Weights have no sampling error: the standard error is NaN."""

    @abstractmethod
    def summarize(self, tensor: Tensor, whole: bool = True) -> Any:
        """What one parameter contributes to its layer: a few numbers. The tensor may be large; take it in `blocks`.

        Not `whole`: the layer is a unit whose tensors are slices of parameters.
        """

    @abstractmethod
    def combine(self, summaries: Sequence[Any]) -> LayerScore:
        """The score of a layer from the summaries of its tensors."""

    def statistic(self, model: UniversalModel) -> None:
        return None

    def score(self, model: UniversalModel, statistic: None) -> Mapping[str, LayerScore]:
        return {
            layer.name: self.combine([self.summarize(dense(t), not layer.masked) for _, t in layer.tensors()])
            for layer in model.layers
        }


def blocks(matrix: Tensor, dim: int = 0) -> Iterator[Tensor]:
    """The matrix in float64, cut along `dim` into pieces of about `BLOCK` values."""
    across = matrix.shape[1 - dim]
    for piece in matrix.split(max(1, BLOCK // max(across, 1)), dim=dim):
        yield piece.double()


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """All values in float64, `BLOCK` at a time."""
    for piece in tensor.reshape(-1).split(BLOCK):
        yield piece.double()


def matrices(tensor: Tensor, whole: bool = True) -> list[Tensor]:
    """A weight as matrices (outputs, inputs × kernel); a fused query-key-value projection as its three parts, if `whole`."""
    if tensor.dim() < 2:
        return []
    w = tensor.flatten(1)
    if not whole:  # a slice of a matrix is never a fused projection
        return [w] if min(w.shape) > 1 else []
    if w.shape[0] == 3 * w.shape[1]:
        return list(w.chunk(3))
    if w.shape[1] == 3 * w.shape[0]:  # stored inputs first
        return list(w.chunk(3, dim=1))
    return [w] if min(w.shape) > 1 else []


def weighted_mean(parts: Sequence[tuple[int, float]]) -> float:
    """The mean of the values of (size, value), by size."""
    return math.fsum(n * value for n, value in parts) / sum(n for n, _ in parts)


def score_file(path: str | Path, analyzers: Mapping[str, WeightAnalyzer]) -> ImportanceReport:
    """Scores the layers in the weights at `path` (a file, a folder, an index of shards), with one tensor in memory at a time.

    What is a layer follows from the names (see `layerwise.weights.grouping`); what lies outside is named in the notes. Raises
    `ModelError` LW-M20 where the names show no layer, and what `stream_weights` raises.
    """
    described = describe_weights(path)
    parameters = {name: tensor for name, tensor in described.items() if is_parameter(name, tensor)}
    layers = layers_of({name: tuple(tensor.shape) for name, tensor in parameters.items()})
    if not layers:
        what = "No layers were found: no tensor name tells of one."
        raise ModelError(what, place=str(path), remedy="Load the model with its class.", code="LW-M20")
    owner = {name: layer for layer, names in layers.items() for name in names}
    summaries, seconds = _summaries(path, analyzers, owner)
    scores = {label: _scores(a, summaries[label], layers, seconds[label]) for label, a in analyzers.items()}
    infos = tuple(_info(name, i, [parameters[n] for n in names]) for i, (name, names) in enumerate(layers.items()))
    notes = _notes([n for n in parameters if n not in owner], [n for n in described if n not in parameters])
    return ImportanceReport(Path(path).name, "", "", infos, scores, notes=notes)


Summaries = dict[str, dict[str, Any]]


def _summaries(
    path: str | Path, analyzers: Mapping[str, WeightAnalyzer], owner: Mapping[str, str]
) -> tuple[Summaries, dict[str, float]]:
    """Per method: tensor name → summary, and the seconds it took."""
    found: Summaries = {label: {} for label in analyzers}
    seconds = dict.fromkeys(analyzers, 0.0)
    for name, tensor in stream_weights(path, mapped=False):
        for label, analyzer in analyzers.items() if name in owner else ():
            started = time.perf_counter()
            found[label][name] = analyzer.summarize(tensor)
            seconds[label] += time.perf_counter() - started
        del tensor  # else it would be held while the next one is read
    return found, seconds


def _scores(
    analyzer: WeightAnalyzer, summaries: Mapping[str, Any], layers: Mapping[str, Sequence[str]], seconds: float
) -> Scores:
    entries = {layer: analyzer.combine([summaries[name] for name in names]) for layer, names in layers.items()}
    return Scores(analyzer.method, analyzer.measured_in(), entries, 0, seconds, analyzer.settings())


def _info(name: str, index: int, tensors: Sequence[Tensor]) -> LayerInfo:
    parameters = sum(tensor.numel() for tensor in tensors)
    group = name.rpartition(".")[0]
    return LayerInfo(
        name, index, "tensors", parameters, skippable=False, group=group, reason="read from a file: there is no module"
    )


def _notes(outside: Sequence[str], buffers: Sequence[str]) -> tuple[str, ...]:
    notes = [
        "Layers follow from the names of the tensors, in the order of the names: a file does not say in which order they run."
    ]
    if outside:
        notes.append(f"{len(outside):,} tensors lie outside the layers and were not scored: {listed(outside)}.")
    if buffers:
        notes.append(f"{len(buffers):,} tensors are no parameters (buffers, whole numbers): {listed(buffers)}.")
    return tuple(notes)


def only_weights(analyzers: Mapping[str, ImportanceAnalyzer]) -> dict[str, WeightAnalyzer]:
    """The same, if all of them can do with a file. Raises `UsageError` that names those that cannot."""
    others = [label for label, analyzer in analyzers.items() if not isinstance(analyzer, WeightAnalyzer)]
    if others:
        what = f"{', '.join(others)} need a model that runs; a file of weights is none."
        raise UsageError(what, remedy="Choose methods that read weights only, or methods='auto'.")
    return {label: analyzer for label, analyzer in analyzers.items() if isinstance(analyzer, WeightAnalyzer)}


__all__ = ["SCHEME", "WeightAnalyzer", "blocks", "chunks", "matrices", "only_weights", "score_file", "weighted_mean"]

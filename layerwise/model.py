"""`UniversalModel`: a module, the adapter that feeds it and the task it does. Analysis and compression are not methods on it."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.adapter import ModalityAdapter, adapter_for
from layerwise.data import Batch
from layerwise.errors import UsageError, UserModelError, nearest
from layerwise.patching import place, replacing, skip
from layerwise.recurrent import stacked_names, unstacked
from layerwise.source import Source
from layerwise.structure import Layer, read_layers
from layerwise.task import Task
from layerwise.tensors import flattened
from layerwise.trace import evaluating, run, unfused
from layerwise.units import Granularity, read_units


class UniversalModel:
    """Any PyTorch module with its layers, in one shape for every analyzer and method.

    A module with stacked recurrent nets is exchanged for its twin (`layerwise.recurrent.unstacked`), which shares its weights.

    `example` is one batch to read the structure with; without one the adapter makes it, and where it cannot,
    the first batch of data that the model meets is kept (`see`). `notes` say in words what was assumed or adapted on loading.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        adapter: ModalityAdapter | None = None,
        task: Task | None = None,
        source: Source | None = None,
        name: str = "",
        example: Batch | None = None,
    ) -> None:
        self.module = unstacked(module)
        self.adapter = adapter or adapter_for(module)
        self.task = task
        self.source = source
        self.name = name or type(module).__name__
        self.notes: tuple[str, ...] = tuple(
            f"{name or 'the model'}: {module.get_submodule(name).num_layers} stacked layers, run one by one by an exact twin "
            "that shares their weights (layerwise.recurrent.unstacked)"
            for name in stacked_names(module)
        )
        self._example = example
        self._layers: list[Layer] | None = None
        self._units: list[Layer] | None = None

    @property
    def domain(self) -> str:
        """text, vision, audio, … or other."""
        return self.adapter.modality

    @property
    def device(self) -> torch.device:
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def example(self) -> Batch:
        """One small batch. Raises `UsageError` when none is known yet."""
        if self._example is None:
            self._example = self.adapter.example(self.module)
        if self._example is None:
            raise UsageError(
                f"How to call {self.name} is not known: a plain module does not say what it reads.",
                remedy="Give data, or load(module, example=batch).",
            )
        return self._example.to(self.device)

    def read_with(self, example: Batch) -> None:
        """From now on `example` is the batch that the structure is read with; the layers are read afresh."""
        self._example, self._layers, self._units = example, None, None

    def see(self, batch: Batch) -> None:
        """Keeps a few samples of `batch` as the example (if there is none yet) and settles the task.

        Raises `DataError` for ready batches of which the adapter cannot tell what belongs to which sample.
        """
        self.adapter.accept(batch)
        if self._example is None:
            self._example = batch.narrow(0, min(batch.size, 2))
        if self.task is None:
            self.task = self.adapter.default_task(self.module, batch, self.output(self.example))

    @property
    def blocks(self) -> list[Layer]:
        """The blocks in the order in which they run, read once."""
        if self._layers is None:
            self._layers = read_layers(self.module, self.example)
        return self._layers

    @property
    def layers(self) -> list[Layer]:
        """The layers in the order in which they run: the blocks, unless this is a view `at` another granularity."""
        return self.blocks if self._units is None else self._units

    def at(self, granularity: Granularity) -> UniversalModel:
        """The same module seen at one or several granularities: its `layers` are blocks, sublayers, heads or channels.

        Raises `UsageError` for an unknown granularity and (LW-U77) for one at which the model has no unit; what was not found of
        it is added to `notes`.
        """
        view = self.around(self.module, source=self.source)
        found = read_units(self.module, self.example, self.blocks, granularity)
        view._layers, view._units = self.blocks, found.units
        view.notes = (*self.notes, *found.notes())
        return view

    def get_layers(self) -> list[Layer]:
        """The layers in the order in which they run."""
        return self.layers

    def layer(self, name: str) -> Layer:
        """The layer with this dotted path. Raises `UsageError` with the nearest name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UsageError(f"{self.name} has no layer {name!r}.", remedy=nearest(name, [x.name for x in self.layers]))

    def get_layer_parameters(self, layer_idx: int) -> dict[str, nn.Parameter]:
        """Name within the layer → parameter (the live one, not a copy)."""
        return dict(self._at(layer_idx).module.named_parameters())

    def forward_with_hooks(self, x: Any, layer_idx: int) -> dict[str, Tensor]:
        """One forward on `x` (a batch in any accepted form): the layer's ``input`` and ``output`` and the ``model_output``."""
        layer = self._at(layer_idx)
        with self.capture([layer.name]) as seen:
            output = self.output(Batch.of(x))
        if layer.name not in seen:
            raise UserModelError(
                f"The layer {layer.name} ran when the layers were read and does not run on this input.",
                place=self.name,
                remedy="A forward that chooses its layers each time cannot be ranked: fix the choice, or give load(example=...).",
                code="LW-U76",
            )
        return {"input": seen[layer.name][0], "output": seen[layer.name][1], "model_output": output}

    def _at(self, index: int) -> Layer:
        if not 0 <= index < len(self.layers):
            raise UsageError(f"{self.name} has the layers 0 … {len(self.layers) - 1}, not {index}.")
        return self.layers[index]

    def output(self, batch: Batch) -> Tensor:
        """The tensor that the task reads, in eval mode; gradients as the caller has set them."""
        with evaluating(self.module):
            return batch.by_sample(self.read(run(self.module, batch.to(self.device))))

    def read(self, raw: Any) -> Tensor:
        """The one tensor of what the forward gave that the task reads: the task's choice, or else the adapter's main tensor."""
        chosen = self.task.reads(raw) if self.task is not None else None
        return self.adapter.output(raw) if chosen is None else chosen

    def predict(self, batch: Any) -> Tensor:
        """The tensor that the task reads, without gradients."""
        with torch.no_grad():
            return self.output(Batch.of(batch))

    def loss(self, batch: Any) -> Tensor:
        """The task's mean loss on `batch` in nats (a scalar; for `fidelity` 0 by definition)."""
        batch = Batch.of(batch).to(self.device)
        self.see(batch)
        assert self.task is not None  # set by see
        output = self.output(batch)
        values, weights = self.task.losses(output, batch, output.detach())
        return values.sum() / weights.sum()

    def clone(self) -> UniversalModel:
        """An independent copy with the same adapter, task, source and layers."""
        return self.changed(copy.deepcopy(self.module), source=self.source)

    def changed(self, module: nn.Module, *, source: Source | None) -> UniversalModel:
        """As `around`, for a module with the same paths: its layers keep their names, and those that lost their weights are gone.

        Read afresh, the last block of a chain whose others were dropped would not be seen as one.
        """
        model = self.around(module, source=source)
        if self._layers is not None:
            there = [(layer, module.get_submodule(layer.name)) for layer in self._layers]
            kept = [(layer, found) for layer, found in there if any(True for _ in found.parameters())]
            model._layers = [_moved(layer, found, i) for i, (layer, found) in enumerate(kept)]
        return model

    def around(self, module: nn.Module, *, source: Source | None) -> UniversalModel:
        """The same adapter, task and example around another module; its layers are read afresh."""
        model = UniversalModel(module, adapter=self.adapter, task=self.task, source=source, name=self.name, example=self._example)
        model.notes = self.notes
        return model

    @contextmanager
    def capture(self, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Inside, each forward fills the dict with layer name → (main input, main output), copies that later writes spare."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack:
            for layer in [self.layer(n) for n in names]:
                if layer.stream is None:
                    raise UsageError(f"{layer.name} has no stream of its own to capture.", remedy="Capture its block.")
                stack.enter_context(_recording(layer, seen))
            yield seen

    @contextmanager
    def skipping(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, the named layers pass their input on; units add nothing. Raises `UsageError` for one that cannot be skipped."""
        with ExitStack() as stack:
            for layer in [self.layer(n) for n in names]:
                if not layer.skippable:
                    raise UsageError(f"The layer {layer.name} cannot be skipped: {layer.reason}.")
                if layer.site is not None:
                    stack.enter_context(unfused())  # a fused block calls no module inside
                stack.enter_context(replacing(place(layer), skip(layer)))
            yield

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the class, and every parameter's and buffer's name, type, shape and bytes."""
        digest = hashlib.sha256(type(self.module).__qualname__.encode())
        for name, tensor in sorted(self.module.state_dict(keep_vars=True).items()):
            if not isinstance(tensor, Tensor):
                continue
            for key, plain in flattened(name, tensor.detach()).items():
                digest.update(f"{key}{tuple(plain.shape)}{plain.dtype}".encode())
                digest.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"UniversalModel({self.name}, {self.domain}, task={self.task and self.task.name})"


def _moved(layer: Layer, module: nn.Module, index: int) -> Layer:
    """The same layer as `module`, with the silent modules that this one has in the places of the other's."""
    inner = dict(module.named_modules())
    silent = tuple(inner[name] for name, m in layer.module.named_modules() if m in layer.silent and name in inner)
    return replace(layer, module=module, index=index, silent=silent)


@contextmanager
def _recording(layer: Layer, seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    assert layer.stream is not None, layer.name
    stream = layer.stream
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(trees.get((args, kwargs), stream.enters).clone())

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[layer.name] = (entered.pop(), trees.get(output, stream.leaves).clone())

    with ExitStack() as stack:
        stack.callback(layer.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(layer.module.register_forward_hook(leave, with_kwargs=True).remove)
        yield

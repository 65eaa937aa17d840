"""One forward in which every tensor carries its labels (`layerwise.coupling.labels`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from layerwise import trees
from layerwise.coupling.labels import ALONE, Labels, Layers, along, compact, line, unique, varying
from layerwise.coupling.rules import made, pointwise, rule_of
from layerwise.data import Batch
from layerwise.trace import evaluating, run, unfused

MOST = 1 << 20  # indices of a dimension that gets labels


def labelled(module: nn.Module, batch: Batch) -> Labels:
    """Runs `module` once on `batch`, in eval mode and without gradients, and gives what the labels met."""
    mode = Labelling(module)
    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(unfused())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # in parts: products and a softmax
        stack.enter_context(mode)
        output = run(module, batch)
    for _, tensor in trees.tensors(output):
        mode.fix(tensor, "the model gives it as its output")
    return mode.labels


class Labelling(TorchDispatchMode):
    """Follows the labels through every operator. `pure` tensors are parameters and what is made of parameters alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.labels = Labels()
        self.known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor → its layers
        self.purely: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.blanks: WeakTensorKeyDictionary = (
            WeakTensorKeyDictionary()
        )  # filled with one value, as large as the model wants them
        convolutions = [m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)]
        owned = {id(p) for m in convolutions for p in m.parameters(recurse=False)}
        kernels = {name for name, p in module.named_parameters() if p.dim() > 2 and id(p) in owned}
        self.labels.kernels = kernels
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                # beyond the second dimension lie the places of a kernel
                dims = range(2) if tensor.dim() > 3 or name in kernels else range(tensor.dim())
                wanted = [d for d in dims if 1 < tensor.shape[d] <= MOST]
                self.known[tensor] = self.labels.fresh(name, tensor, wanted)
                self.purely[tensor] = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see layerwise.trace: otherwise the first call imports the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [t for _, t in trees.tensors((args, kwargs))]
        if any(self.known.get(t) for t in given) and not made(func):
            self._follow(func, args, kwargs, result)
        elif isinstance(result, Tensor):
            self._follow_blank(func, given, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        try:
            rule_of(func)(self, func, args, kwargs, result)
        except Exception:  # a form of the operator that its rule does not know: nothing of it may be cut
            for _, tensor in trees.tensors((args, kwargs)):
                self.fix(tensor, f"the operator {func._schema.name} is not followed in this form")
            for _, tensor in trees.tensors(result):
                self.known.pop(tensor, None)

    def _follow_blank(self, func: Any, given: Sequence[Tensor], result: Tensor) -> None:
        """Notes the dimensions whose size comes only from tensors that the model fills with one value."""
        if made(func):
            self.blanks[result] = frozenset(range(result.dim()))
        elif not any(t in self.blanks for t in given):
            return
        elif rule_of(func) is pointwise:
            blank = set(range(result.dim()))
            for tensor in given:
                own = self.blanks.get(tensor, frozenset())
                behind = result.dim() - tensor.dim()
                blank -= {d + behind for d, size in enumerate(tensor.shape) if size > 1 and d not in own}
            self.blanks[result] = frozenset(blank)
        elif all(len(self.blanks.get(t, ())) == t.dim() for t in given):
            self.blanks[result] = frozenset(range(result.dim()))

    def layers(self, tensor: Any) -> Layers:
        return list(self.known.get(tensor) or ()) if isinstance(tensor, Tensor) else []

    def pure(self, tensor: Tensor) -> bool:
        return tensor in self.purely

    def fix(self, tensor: Tensor, reason: str) -> None:
        """No label of this tensor may be cut."""
        for layer in self.layers(tensor):
            self.labels.fix(layer, reason)

    def add(self, tensor: Tensor, layer: Tensor, *, moved: Tensor | None = None) -> None:
        """One more layer of `tensor`; `settle` is to follow."""
        self.known[tensor] = [*self.layers(tensor), compact(layer)]

    def put(self, tensor: Tensor, layers: Iterable[Tensor], *, moved: Tensor | None = None, pure: bool = False) -> None:
        """Exchanges the layers of `tensor`."""
        self.known[tensor] = [compact(layer) for layer in layers]
        self.settle(tensor, moved=moved, pure=pure)

    def settle(self, tensor: Tensor, *, moved: Tensor | None = None, pure: bool = False) -> None:
        """Layers that vary no more, or along the same dimension as another one, are dropped and fixed; grids are noted."""
        kept: Layers = []
        for layer in self.layers(tensor):
            dims = set(varying(layer))
            if not dims:
                self.labels.fix(layer, ALONE)
            elif any(dims & set(varying(other)) for other in kept) and (moved is None or not self.pure(moved)):
                self._overlapping(kept, layer)
            else:
                kept.append(layer)
            if len(dims) > 1:
                self.labels.grid(layer)
        self.known[tensor] = kept
        if pure or (moved is not None and self.pure(moved)):
            self.purely[tensor] = True

    def _overlapping(self, kept: Layers, layer: Tensor) -> None:
        """Of two that share a dimension after a change of shape the first is the outer one, and stays."""
        self.labels.fix(layer, "two kinds of units lie in one dimension")

    def together(self, tensors: Sequence[Tensor], shape: Sequence[int], *, at: int | None = None) -> Layers:
        """What an element-wise operator gives; vectors lie along dimension `at` where that is said."""
        parts, sizes = [], []
        seen: list[Tensor] = []
        for tensor in tensors:
            if any(tensor is other for other in seen) or not tensor.dim():
                continue
            seen.append(tensor)
            form = list(tensor.shape)
            layers = self.layers(tensor)
            if at is not None and tensor.dim() == 1:
                form = [1] * len(shape)
                form[at] = tensor.numel()
                layers = [layer.reshape(form) for layer in layers]
            form = [1] * (len(shape) - len(form)) + form
            parts.append(
                [layer.reshape([1] * (len(shape) - layer.dim()) + list(layer.shape)).expand(tuple(shape)) for layer in layers]
            )
            blank = {d + len(form) - tensor.dim() for d in self.blanks.get(tensor, ())}
            sizes.append({d for d, size in enumerate(form) if size > 1} - blank)
        return self.joined(parts, sizes)

    def joined(self, parts: Sequence[Layers], sizes: Sequence[set[int]]) -> Layers:
        """The layers of operands that meet element by element; `sizes`: along which dimensions each is no single element."""
        parts = [[compact(layer) for layer in layers] for layers in parts]
        for i, layers in enumerate(parts):
            for number, layer in enumerate(layers):
                free = set[int]()
                for j, others in enumerate(parts):
                    covered = {d for other in others for d in varying(other)}
                    free |= set(varying(layer)) & sizes[j] - covered if i != j else set()
                layers[number] = self.labels.unite(layer, free, "something of fixed size meets it")
        found: Layers = []
        for layer in (x for layers in parts for x in layers):
            same = next((i for i, other in enumerate(found) if set(varying(layer)) & set(varying(other))), None)
            if same is None:
                found.append(layer)
            else:
                fine, coarse = sorted((found[same], layer), key=lambda x: -len(varying(x)))
                self.labels.meet(fine, coarse, "it meets what stays")
                found[same] = fine
        return found

    def product(self, a: Tensor, b: Tensor, left: Layers, right: Layers, shape: Sequence[int]) -> Layers:
        """What (batch, m, k) times (batch, k, n) gives.

        Layers that vary along the batch are heads, or whatever else is multiplied on its own: each goes as a whole.
        """
        heads = [layer for layer in (*left, *right) if 0 in varying(layer)]
        left, right = ([layer for layer in layers if 0 not in varying(layer)] for layers in (left, right))
        left = [self.labels.unite(x, [1], "a product mixes it") if 2 in varying(x) else x for x in left]
        right = [self.labels.unite(x, [2], "a product mixes it") if 1 in varying(x) else x for x in right]
        eats = (self.pure(b) and not self.pure(a), self.pure(a) and not self.pure(b))
        ins, cols = ([line(x, d) for x in layers if d in varying(x)] for layers, d in ((left, 2), (right, 1)))
        self.contract(ins, cols, eats=eats[0], eaten_left=eats[1])
        found = [along(line(x, 1), 1, shape) for x in left if 1 in varying(x)]
        found += [along(line(x, 2), 2, shape) for x in right if 2 in varying(x)]
        for given, layers, dim in ((eats[0], right, 2), (eats[1], left, 1)):
            self.labels.given += [unique(x) for x in layers if given and dim in varying(x)]
        if heads:
            whole = [self.labels.unite(x, [1, 2], "a head goes as a whole") for x in heads]
            lines = [line(x, 0) for x in whole]
            for other in lines[1:]:
                self.labels.bond(lines[0], other)
            self.labels.heads += [unique(x) for x in lines]
            found.insert(0, along(lines[0], 0, shape))
        return found

    def contract(self, left: Layers, right: Layers, *, eats: bool, eaten_left: bool = False) -> None:
        """Labels (k,) of both operands along the summed dimension; `eats`: the right one's are columns of a weight."""
        for layer in (*left, *right) if not left or not right else ():
            self.labels.unite(layer, [0], "a product with something of fixed size takes it")
        for own in left:
            for other in right:
                self.labels.meet(own, other, "it meets what stays", both=True)
        self.labels.eaten += [unique(x) for x in right if eats] + [unique(x) for x in left if eaten_left]

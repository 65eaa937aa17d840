"""Each sample's gradient of each parameter from one shared backward pass, formed module by module and freed at once.

Linear and convolution layers have closed forms (an outer product of input and output gradient). Every other module that owns
parameters (norms, scales, position tables, blocks with a bare ``nn.Parameter``) is differentiated by itself, sample by sample,
with `torch.func.vmap`. A parameter whose module cannot be split by samples is left to the `loop`: one backward pass per sample,
dearer and equally exact; so are all parameters where the rows of a batch are not its samples (graphs). A parameter used several
times has its gradients summed over the uses before anyone squares them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.module_gradients import module_gradients
from layerwise.structure import Layer

Emit = Callable[[int, Tensor, Tensor], None]


class SampleGradients:
    """Attached to the modules of `layers`; calls ``emit(layer, parameter, gradient of shape (samples, *parameter.shape))``.

    `loop` holds the parameters that have to be differentiated once per sample; it only grows.
    """

    def __init__(self, root: nn.Module, layers: Sequence[Layer], emit: Emit, blocks: Sequence[Layer] | None = None) -> None:
        self.emit = emit
        self.samples = 0
        self.splits = True
        self.loop: set[Tensor] = set()
        self.owner = _owners(layers)
        self.modules: dict[nn.Module, dict[str, Tensor]] = {}
        for module in root.modules():  # of the whole model: a tied embedding uses a layer's parameter as well
            own: dict[str, Tensor] = {n: p for n, p in module.named_parameters(recurse=False) if p in self.owner}
            if own:
                self.modules[module] = own
        for layer in blocks if blocks is not None else layers:
            self._adopt(layer)
        self._pending: dict[Tensor, Tensor] = {}
        self._uses: dict[Tensor, int] = defaultdict(int)
        self._listen: Callable[[Tensor, Tensor], None] | None = None
        self._inside = False

    def _adopt(self, layer: Layer) -> None:
        """Parameters of modules that are never called (attention's output projection in torch) go to the next one outside."""
        names = {module: name for name, module in layer.module.named_modules()}
        for module in (m for m in layer.silent if m in self.modules):
            path = names[module].split(".")
            while path:
                tail = names[module].split(".")[len(path) - 1 :]
                path.pop()
                owner = layer.module.get_submodule(".".join(path))
                if owner not in layer.silent:
                    break
            adopted = {".".join([*tail, name]): p for name, p in self.modules.pop(module).items()}
            self.modules[owner] = self.modules.get(owner, {}) | adopted

    @contextmanager
    def attached(self, samples: int, *, split: bool = True) -> Iterator[None]:
        """Inside, one forward on `samples` samples and its backward passes are turned into per-sample gradients.

        Without `split` rows are not samples, and everything is left to the loop.
        """
        self.samples, self.splits = samples, split
        self._pending.clear()
        self._uses.clear()
        with ExitStack() as stack:
            if not split:
                self.loop |= set(self.owner)
            for module in self.modules if split else ():
                stack.callback(module.register_forward_hook(self._record, with_kwargs=True).remove)
            yield

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._inside or not torch.is_grad_enabled():
            return None
        own = self.modules[module]
        floats = [(path, t) for path, t in trees.tensors(output) if t.is_floating_point()]
        if len(floats) == 1 and not floats[0][1].requires_grad:  # nothing before it needs a gradient: here is where it begins
            output = trees.replaced(output, floats[0][0], floats[0][1].detach().requires_grad_().clone())
        outputs = [t for _, t in trees.tensors(output) if t.requires_grad]
        if len(outputs) != 1:  # the gradient comes in by several ways at once
            self.loop |= set(own.values())
            return None
        for parameter in own.values():
            self._uses[parameter] += 1
        saved = trees.mapped((args, kwargs), torch.Tensor.detach)
        versions = [(t, t._version) for _, t in trees.tensors((args, kwargs))]
        outputs[0].register_hook(lambda gradient: self._differentiate(module, saved, versions, gradient))
        return output

    def _differentiate(self, module: nn.Module, saved: Any, versions: list[tuple[Tensor, int]], gradient: Tensor) -> None:
        wanted = {name: p for name, p in self.modules[module].items() if p not in self.loop}
        if not wanted:
            return
        found = None
        if all(t._version == version for t, version in versions):  # else the input was overwritten in place meanwhile
            self._inside = True
            try:
                with torch.no_grad():
                    found = module_gradients(module, wanted, saved, gradient, self.samples)
            finally:
                self._inside = False
        for name, parameter in wanted.items():
            if found is None:
                self.loop.add(parameter)
                self._pending.pop(parameter, None)
            else:
                self._collect(parameter, found[name])

    def _collect(self, parameter: Tensor, gradient: Tensor) -> None:
        if self._listen is not None:
            self._listen(parameter, gradient)
            return
        before = self._pending.pop(parameter, None)
        total = gradient if before is None else before + gradient
        self._uses[parameter] -= 1
        if self._uses[parameter] > 0:
            self._pending[parameter] = total
        else:
            self._emit(parameter, total)

    def _emit(self, parameter: Tensor, gradient: Tensor) -> None:
        for layer in self.owner[parameter]:
            self.emit(layer, parameter, gradient)

    def check_attribution(self, losses: Tensor) -> None:
        """Differentiates one sample's loss alone (one backward pass): no other sample may get a gradient from it.

        Where one does, the module folds samples together (tokens before samples, say) and its parameters go to the loop.
        """
        chosen = len(losses) // 2
        others = [n for n in range(len(losses)) if n != chosen]
        leaks: dict[Tensor, Tensor] = {}

        def listen(parameter: Tensor, gradient: Tensor) -> None:
            leaked = gradient[others].abs().amax()
            leaks[parameter] = torch.maximum(leaks[parameter], leaked) if parameter in leaks else leaked

        self._listen = listen
        try:
            losses[chosen].backward(retain_graph=True)
        finally:
            self._listen = None
        if leaks:
            found = torch.stack(list(leaks.values())).cpu()
            self.loop |= {p for p, leaked in zip(leaks, found, strict=True) if bool(leaked > 0)}

    def finish(self) -> None:
        """After the backward pass: emits what waits for a use that no gradient reached."""
        for parameter, gradient in self._pending.items():
            if parameter not in self.loop:
                self._emit(parameter, gradient)
        self._pending.clear()

    def run_loop(self, losses: Tensor) -> int:
        """One backward pass per sample for the parameters in `loop`, which must require gradients; returns the number."""
        parameters = [p for p in self.loop if p.requires_grad]
        rows: list[tuple[Tensor | None, ...]] = []
        if losses.requires_grad:
            rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
        for i, parameter in enumerate(parameters):  # what no loss is reached by has a gradient of 0
            grads = [row[i] for row in rows] or [None] * len(losses)
            self._emit(parameter, torch.stack([torch.zeros_like(parameter) if g is None else g for g in grads]))
        return len(rows)


def _owners(layers: Sequence[Layer]) -> dict[Tensor, tuple[int, ...]]:
    """Parameter → the layers that own it: one of each granularity, the first where several share it.

    Units that are slices own none: their gradients are taken through masks (`layerwise.sweep.Seen.mask_gradients`).
    """
    found: dict[Tensor, dict[str, int]] = defaultdict(dict)
    for layer in (x for x in layers if not x.masked):
        for _, parameter in layer.tensors():
            found[parameter].setdefault(layer.granularity, layer.index)
    return {parameter: tuple(owners.values()) for parameter, owners in found.items()}

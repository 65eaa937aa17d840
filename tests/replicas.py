"""Slow twins of the engines and analyzers: a few lines that follow the definition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from layerwise import trees
from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.patching import replacing
from layerwise.structure import Layer
from layerwise.trace import evaluating, unfused


@contextmanager
def skipping_by_hook(model: UniversalModel, layers: Iterable[Layer], counts: Counts) -> Iterator[None]:
    """The naive skip: every block runs, the skipped ones' output is exchanged for their input."""
    skipped = {layer.index for layer in layers}

    def call(layer: Layer) -> Any:
        def counted(forward: Any, args: Any, kwargs: Any) -> Any:
            counts.block_calls += 1
            assert layer.stream is not None
            entering = trees.get((args, kwargs), layer.stream.enters).clone()  # the block may write into its input
            output = forward(*args, **kwargs)
            return trees.replaced(output, layer.stream.leaves, entering) if layer.index in skipped else output

        return counted

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model.module))
        for layer in model.layers:
            stack.enter_context(replacing(layer.module, call(layer)))
        yield


def naive_skip(model: UniversalModel, batch: Batch, layers: Iterable[Layer], counts: Counts | None = None) -> Tensor:
    """The output with `layers` skipped, by hooks."""
    with skipping_by_hook(model, layers, counts or Counts()):
        return model.output(batch)


@contextmanager
def silencing_by_hook(units: Iterable[Layer]) -> Iterator[None]:
    """The naive silencing: hooks put zeros where the units are seen; every block runs."""

    def zeroed(unit: Layer, tree: Any) -> Any:
        site = unit.site
        assert site is not None
        keep = torch.ones_like(trees.get(tree, site.path), dtype=torch.bool)
        chosen = keep if not site.stop else keep.transpose(site.dim, -1)[..., site.start : site.stop]
        chosen.fill_(False)
        return trees.replaced(tree, site.path, torch.where(keep, trees.get(tree, site.path), 0.0))

    with ExitStack() as stack:
        stack.enter_context(unfused())
        for unit in units:
            assert unit.site is not None
            module = unit.site.module
            if unit.site.entering:
                handle = module.register_forward_pre_hook(lambda m, a, k, u=unit: zeroed(u, (a, k)), with_kwargs=True)
            else:
                handle = module.register_forward_hook(lambda m, a, o, u=unit: zeroed(u, o))
            stack.callback(handle.remove)
        yield


def mask_gradients(model: UniversalModel, batch: Batch, unit: Layer, seed: int) -> list[float]:
    """Each sample's derivative of its own loss by a mask on what is seen at the unit's site, one sample and mask at a time."""
    assert model.task is not None
    assert unit.site is not None
    site, found = unit.site, []
    with unfused():
        for n in range(batch.size):
            mask = torch.ones((), requires_grad=True)

            def masked(tree: Any, mask: Tensor = mask) -> Any:
                tensor = trees.get(tree, site.path)
                factor = torch.ones_like(tensor)
                chosen = factor if not site.stop else factor.narrow(site.dim, site.start, site.stop - site.start)
                chosen.zero_()
                return trees.replaced(tree, site.path, tensor * (factor + (1 - factor) * mask))

            if site.entering:
                handle = site.module.register_forward_pre_hook(lambda m, a, k, f=masked: f((a, k)), with_kwargs=True)
            else:
                handle = site.module.register_forward_hook(lambda m, a, o, f=masked: f(o))
            output = model.output(batch)
            handle.remove()
            loss = model.task.likelihood(output, batch, torch.Generator().manual_seed(seed))[n]
            found.append(float(torch.autograd.grad(loss, mask)[0]))
    return found


def sample_gradients(model: UniversalModel, batch: Batch, seed: int) -> list[list[list[Tensor]]]:
    """[sample][layer] → the gradients of that sample's negative log-likelihood, by one backward pass per sample."""
    assert model.task is not None
    with unfused():
        losses = model.task.likelihood(model.output(batch), batch, torch.Generator().manual_seed(seed))
    found = []
    for loss in losses:
        row = []
        for layer in model.layers:
            parameters = list(layer.module.parameters())
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            row.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])
        found.append(row)
    return found


def state_of(model: UniversalModel) -> dict[str, Any]:
    """Everything that an analysis must leave as it found it."""
    module = model.module
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "required": [p.requires_grad for p in module.parameters()],
        "training": [m.training for m in module.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
        "patched": ["forward" in vars(m) for m in module.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def same_state(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [key for key in a if not _equal(a[key], b[key])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)

"""Which weights become zero: the lowest of given scores, of all tensors together, per row, or per group of M.

Decision: the threshold is found by counting the bits of the scores, a chunk at a time, so that it is exact and takes no memory
that grows with the model but the masks; `torch.quantile` interpolates between elements and has refused more than 16 M of them,
and sorting a model takes several times its size. What is zero already counts first, so that pruning twice to the same amount
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.errors import UserModelError
from layerwise.method import Check
from layerwise.model import UniversalModel
from layerwise.structure import Layer
from layerwise.tensors import differing, state, wraps

CHUNK = 1 << 22  # elements looked at in one go
ZERO = -1.0  # the score of a weight that is zero already


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight that `module` multiplies by. `outputs` is the dimension of its outputs, which transformers' Conv1D keeps last."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    outputs: int

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (outputs, inputs, …), a view."""
        return tensor.movedim(self.outputs, 0)


def weights_of(root: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Dotted name → every parameter of more than one dimension in `layers`, shared ones once."""
    wanted = {id(p) for name in layers for p in root.get_submodule(name).parameters() if p.dim() > 1}
    return {name: p for name, p in root.named_parameters() if id(p) in wanted}


def matrices_of(layer: Layer) -> list[Matrix]:
    """The weights of the linear and convolution layers inside, shared ones once."""
    found: dict[int, Matrix] = {}
    for name, module in layer.module.named_modules():
        outputs = _outputs(module)
        if outputs is not None:
            found.setdefault(id(module.weight), Matrix(_path(layer.name, name, "weight"), module, module.weight, outputs))
    return list(found.values())


def called_matrices(layer: Layer) -> list[Matrix]:
    """Those whose module is called; the output projection of torch's attention is not, its weight is read from outside."""
    return [m for m in matrices_of(layer) if m.module not in layer.silent]


def remaining(layer: Layer, matrices: Iterable[Matrix]) -> tuple[str, ...]:
    """The names of the parameters of more than one dimension in `layer` besides these, such as tables."""
    own = {id(m.weight) for m in matrices}
    return tuple(_path(layer.name, name) for name, p in layer.module.named_parameters() if p.dim() > 1 and id(p) not in own)


def _path(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 0
    return 1 if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), nn.Parameter) else None


def quantized(layer: Layer) -> str:
    """'' or the reason why no weight of `layer` can be set to zero."""
    return "its weights are quantized already" if any(wraps(p) for p in layer.module.parameters()) else ""


def scored(weight: Tensor, scores: Tensor) -> Tensor:
    """`scores` with `ZERO` where the weight is zero already. Raises `UserModelError` for scores that are not finite."""
    if not bool(torch.isfinite(scores).all()):
        raise UserModelError("The scores of its weights are not finite.", remedy="Look for NaN or infinity in the data.")
    return scores.masked_fill(weight == 0, ZERO)


def lowest(scores: Sequence[Tensor], count: int, score: Callable[[Tensor], Tensor] = torch.Tensor.float) -> list[Tensor]:
    """Masks of the `count` lowest of all elements together; of equal ones the first.

    `score` gives the float32 score of each element, at least 0 or `ZERO`; it is called chunk by chunk.
    """
    threshold, ties = _threshold(scores, count, score) if count else (-(2**31), 0)
    masks = []
    for tensor in scores:
        mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        for start, keys in _keys(tensor, score):
            part = keys < threshold
            if ties:
                equal = (keys == threshold).nonzero()[:ties, 0]
                part[equal] = True
                ties -= len(equal)
            mask[start : start + len(keys)] = part
        masks.append(mask.view(tensor.shape))
    return masks


def lowest_in_rows(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` lowest of each row of (rows, columns); of equal ones the first."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)


def _keys(tensor: Tensor, score: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(start, keys) of each chunk: whole numbers in the order of the scores, which a float's bits are from 0 on."""
    for start, part in enumerate(tensor.detach().reshape(-1).split(CHUNK)):
        yield start * CHUNK, score(part).float().contiguous().view(torch.int32)


def _threshold(scores: Sequence[Tensor], count: int, score: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """The key of the `count`-th lowest element, and how many of those that equal it are among the lowest."""
    device = scores[0].device
    high = torch.zeros(1 << 16, dtype=torch.int64, device=device)
    for _, keys in (item for tensor in scores for item in _keys(tensor, score)):
        high += ((keys >> 16) + (1 << 15)).bincount(minlength=1 << 16)
    chosen, before = _bin(high, count)
    low = torch.zeros_like(high)
    for _, keys in (item for tensor in scores for item in _keys(tensor, score)):
        low += (keys[(keys >> 16) + (1 << 15) == chosen] & 0xFFFF).bincount(minlength=1 << 16)
    last, ahead = _bin(low, count - before)
    return ((chosen - (1 << 15)) << 16) + last, count - before - ahead


def _bin(counts: Tensor, count: int) -> tuple[int, int]:
    """The bin in which the `count`-th element lies, and how many lie in the bins before it."""
    sums = counts.cumsum(0)
    chosen = int((sums < count).sum())
    return chosen, int(sums[chosen] - counts[chosen])


@torch.no_grad()
def zero_(weights: Iterable[Tensor], masks: Iterable[Tensor]) -> None:
    """Sets the weights to zero where their mask is True."""
    for weight, mask in zip(weights, masks, strict=True):
        weight.masked_fill_(mask, 0)


def zeros_off(before: UniversalModel, after: UniversalModel, groups: Iterable[Sequence[str]], amount: float) -> Check:
    """Whether each group of weights has the share `amount` of zeros, or as many as it had before if that were more."""
    zeros = total = 0
    for names in groups:
        old, new = ([m.module.get_parameter(name) for name in names] for m in (before, after))
        size = sum(w.numel() for w in new)
        found, had = (sum(int((w == 0).sum()) for w in weights) for weights in (new, old))
        wanted = max(round(amount * size), had)
        if found != wanted:
            return Check(abs(found - wanted), 0, f"zeros more or less than the {wanted:,} asked for", names[0])
        zeros, total = zeros + found, total + size
    return Check(0, 0, f"{zeros:,} of {total:,} weights are 0, as asked for")


def only_zeroed(before: UniversalModel, after: UniversalModel, zeros: Mapping[str, Callable[[Tensor], bool] | None]) -> Check:
    """Whether each tensor is as before, but for weights that became zero in the tensors named in `zeros`.

    Each of these names a condition on the tensor's mask of zeros, or None.
    """
    old, new = state(before.module), state(after.module)
    if old.keys() != new.keys():
        return Check(1, 0, "the names of the tensors differ", min(old.keys() ^ new.keys()))
    asked = {id(new[name]): right for name, right in zeros.items()}  # a tied tensor stands there under each of its names
    wrong = {name: _wrong(old[name], new[name], id(new[name]) in asked, asked.get(id(new[name]))) for name in old}
    pruned = [new[name] for name in zeros]
    gone, total = sum(int((w == 0).sum()) for w in pruned), sum(w.numel() for w in pruned)
    what = f"elements that are neither the original nor one of the zeros asked for; {gone:,} of {total:,} weights are 0"
    return Check(sum(wrong.values()), 0, what, next((n for n, count in wrong.items() if count), ""))


def _wrong(old: Tensor, new: Tensor, pruned: bool, right: Callable[[Tensor], bool] | None) -> int:
    if not pruned or old.shape != new.shape:
        return differing(old, new)
    other = int(((old != new) & (new != 0)).sum())
    return other or int(right is not None and not right(new == 0))

"""Dense attention modules of other libraries, by the names of the matrices they hold: where the heads are, how to narrow them.

One row of `CONVENTIONS` per way to write attention; no model names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.factors import matrix
from layerwise.native.gram import fewest

Grams = Mapping[str, Tensor]
NARROWED = "narrowed_from"  # the attribute of a narrowed attention that keeps the head size it had


@dataclass(frozen=True)
class Part:
    """Rows ``start`` … of the matrix of the module called `name`: `heads` heads, one after the other."""

    name: str
    module: nn.Module
    start: int
    heads: int


@dataclass(frozen=True)
class Dense:
    """One attention: `query`, `key`, `value`, the module called `out_name` that mixes the heads, and numbers per head (`size`).

    `turned`: queries and keys are turned by their position. `tell` gives the attributes that say r instead of `size`; where the
    kernel takes its scale from the head size, `rescaled` says that the queries must make up for it.
    """

    path: str
    module: nn.Module
    query: Part
    key: Part
    value: Part
    out_name: str
    size: int
    tell: Callable[[int], Mapping[str, Any]]
    turned: bool = False
    rescaled: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the modules that give queries, keys and values, each once."""
        return tuple(dict.fromkeys(p.name for p in (self.query, self.key, self.value)))

    @property
    def reads(self) -> tuple[Part, ...]:
        """One part of each of those modules."""
        return tuple({p.name: p for p in (self.query, self.key, self.value)}.values())

    def fitted(self, grams: Grams) -> Subspaces:
        """From the Gram matrices of all heads, (heads of the module, size, size) by module name."""
        q, k, v = (self._of(grams, part) for part in (self.query, self.key, self.value))
        q = q.unflatten(0, (self.key.heads, -1)).sum(1)  # those that share keys
        # queries and keys are scaled against each other at will: each counts with the same weight
        kept = _pairs(q, k) if self.turned else _principal(q / _traces(q) + k / _traces(k))
        return Subspaces(kept, _principal(v), self.turned)

    def unfitted(self) -> Subspaces:
        """The first features of every head, whatever they hold: enough to give a module its shape."""
        like = matrix(self.key.module)
        assert like is not None  # that is what made it an attention
        eye = torch.eye(self.size, dtype=like.dtype, device=like.device).expand(self.key.heads, -1, -1)
        first = Ordered(eye.diagonal(dim1=-2, dim2=-1), eye)
        return Subspaces(first, first, self.turned)

    def _of(self, grams: Grams, part: Part) -> Tensor:
        first = part.start // self.size
        return grams[part.name][first : first + part.heads]


@dataclass(frozen=True)
class Ordered:
    """Directions of each key-value head by falling energy: `values` (heads, size), `vectors` (heads, size, size), one per row."""

    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Subspaces:
    """For queries and keys together, and for values."""

    scores: Ordered
    content: Ordered
    turned: bool

    def rank(self, wanted: int | None, energy: float) -> int:
        """`wanted`, at most the whole head and even where pairs turn; or the fewest with the share `energy` in every head."""
        size = self.scores.values.shape[1]
        if wanted is None:
            wanted = max(fewest(v, energy) for part in (self.scores, self.content) for v in part.values)
        return min(size, wanted + wanted % 2 if self.turned else wanted)

    def columns(self, r: int) -> Tensor:
        """Which features of a turned head stay, (r,): the first halves of the best pairs in their order, then the second."""
        chosen = self.scores.vectors[0, :r].argmax(1)
        return chosen.sort().values


def _traces(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(torch.finfo(grams.dtype).tiny)


def _principal(grams: Tensor) -> Ordered:
    values, vectors = torch.linalg.eigh(grams)
    return Ordered(values.flip(-1), vectors.flip(-1).mT)


def _pairs(q: Tensor, k: Tensor) -> Ordered:
    """Unit vectors, pair by pair: a pair's energy is √(E‖q‖²·E‖k‖²) in it, summed over the heads, since all turn alike."""
    energy = [g.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(1) for g in (q, k)]
    total = (energy[0] * energy[1]).sqrt().sum(0)
    order = total.argsort(descending=True)
    features = torch.stack((order, order + len(order)), 1).flatten()
    values = (total[order] / 2).repeat_interleave(2)
    heads = len(q)
    return Ordered(
        values.expand(heads, -1), torch.eye(2 * len(order), dtype=q.dtype, device=q.device)[features].expand(heads, -1, -1)
    )


class PickedPairs(nn.Module):
    """An attention of narrowed heads, given the angles of the pairs that its heads still have."""

    columns: Tensor

    def __init__(self, inner: nn.Module, columns: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("columns", columns)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any) -> Any:
        """As the inner attention's; the tables (B, T, size) lose the columns of the pairs that are gone."""
        cosine, sine = (table[..., self.columns] for table in position_embeddings)
        return self.inner(hidden_states, position_embeddings=(cosine, sine), **rest)


@torch.no_grad()
def narrowed(root: nn.Module, a: Dense, fit: Subspaces, r: int) -> None:
    """Changes the module in place: heads of r numbers. Queries and keys are projected alike; values, and what mixes them, too."""
    reference = matrix(a.query.module)
    assert reference is not None  # that is what made it an attention
    scores = fit.scores.vectors[:, :r]
    if a.turned:
        scores = torch.eye(a.size, dtype=scores.dtype, device=scores.device)[fit.columns(r)].expand(len(scores), -1, -1)
    scores, content = scores.to(reference), fit.content.vectors[:, :r].to(reference)
    new = {
        id(a.query): _projected(a, a.query, scores * ((r / a.size) ** 0.5 if a.rescaled else 1.0)),
        id(a.key): _projected(a, a.key, scores),
        id(a.value): _projected(a, a.value, content),
    }
    for name in a.names:
        parts = [new[id(p)] for p in (a.query, a.key, a.value) if p.name == name]
        bias = None if parts[0][1] is None else torch.cat([b for _, b in parts if b is not None])
        set_matrix_(root.get_submodule(name), torch.cat([w for w, _ in parts]), bias)
    out = root.get_submodule(a.out_name)
    weight = matrix(out)
    assert weight is not None
    by_head = weight.unflatten(1, (a.value.heads, -1, a.size))
    set_matrix_(out, torch.einsum("ogns,grs->ognr", by_head, content).flatten(1), out.bias)  # type: ignore[arg-type]  # tensor or None
    for key, value in {**a.tell(r), NARROWED: a.size}.items():
        setattr(a.module, key, value)
    if a.turned and r < a.size:
        parent, _, key = a.path.rpartition(".")
        setattr(root.get_submodule(parent), key, PickedPairs(a.module, fit.columns(r)))


def _projected(a: Dense, part: Part, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    """The part's rows and biases in the subspace of their key-value head, (heads·r, d)."""
    weight = matrix(part.module)
    assert weight is not None
    stop = part.start + part.heads * a.size
    rows = weight[part.start : stop].unflatten(0, (len(vectors), -1, a.size))
    bias: Any = part.module.bias
    turned = torch.einsum("grs,gnsd->gnrd", vectors, rows).flatten(0, 2)
    if bias is None:
        return turned, None
    cut = bias[part.start : stop].unflatten(0, (len(vectors), -1, a.size))
    return turned, torch.einsum("grs,gns->gnr", vectors, cut).flatten()


def set_matrix_(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a matrix module another matrix (outputs, inputs) and bias."""
    conv = not isinstance(module, nn.Linear)
    module.weight = nn.Parameter((weight.T if conv else weight).contiguous().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    if conv:
        module.nf, module.nx = weight.shape
    else:
        module.out_features, module.in_features = weight.shape


def dense_attention(root: nn.Module, path: str, module: nn.Module) -> Dense | str | None:
    """The attention that `module` is; None if it is none that is known; or why it cannot be narrowed, in words."""
    children = dict(module.named_children())
    for names, make in CONVENTIONS.items():
        if not names <= children.keys() or any(matrix(children[n]) is None for n in names):
            continue
        between = [n for n, c in children.items() if n not in names and any(True for _ in c.parameters())]
        if between:
            return f"{', '.join(between)} stands between projection and attention"
        return make(root, path, module)
    return None


def _separate(root: nn.Module, path: str, module: Any) -> Dense | str:
    """query, key, value in one module and the mixing matrix beside it, as BERT's family writes it."""
    parent = path.rpartition(".")[0]
    out_name = f"{parent}.output.dense"
    try:
        out = root.get_submodule(out_name)
    except AttributeError:
        return "the matrix that mixes its heads is not beside it"
    heads, size = module.num_attention_heads, module.attention_head_size
    if matrix(out) is None:
        return "its heads are mixed by no plain matrix"
    q, k, v = (Part(f"{path}.{n}", getattr(module, n), 0, heads) for n in ("query", "key", "value"))
    return Dense(path, module, q, k, v, out_name, size, lambda r: {"attention_head_size": r, "all_head_size": r * heads})


def _fused(root: nn.Module, path: str, module: Any) -> Dense:
    """c_attn and c_proj, as GPT-2 writes it."""
    heads, size = module.num_heads, module.head_dim
    q, k, v = (Part(f"{path}.c_attn", module.c_attn, i * heads * size, heads) for i in range(3))
    return Dense(path, module, q, k, v, f"{path}.c_proj", size, lambda r: {"head_dim": r, "split_size": r * heads})


def _grouped(root: nn.Module, path: str, module: Any) -> Dense:
    """q_proj, k_proj, v_proj and o_proj with rotary positions, as Llama's family writes it."""
    size = module.head_dim
    counts = [m_rows(m) // size for m in (module.q_proj, module.k_proj, module.v_proj)]
    names = ("q_proj", "k_proj", "v_proj")
    q, k, v = (Part(f"{path}.{n}", getattr(module, n), 0, c) for n, c in zip(names, counts, strict=True))
    return Dense(path, module, q, k, v, f"{path}.o_proj", size, lambda r: {"head_dim": r}, turned=True)


def _vision(root: nn.Module, path: str, module: Any) -> Dense:
    """qkv and proj, as timm writes it; its kernel takes the scale from the head size."""
    heads, size = module.num_heads, module.head_dim
    q, k, v = (Part(f"{path}.qkv", module.qkv, i * heads * size, heads) for i in range(3))
    told = {"scale": lambda r: r**-0.5, "head_dim": lambda r: r, "attn_dim": lambda r: r * heads}
    return Dense(
        path, module, q, k, v, f"{path}.proj", size, lambda r: {n: f(r) for n, f in told.items()}, rescaled=True
    )  # fmt: skip


def m_rows(module: nn.Module) -> int:
    """Outputs of a matrix module."""
    found = matrix(module)
    return 0 if found is None else int(found.shape[0])


CONVENTIONS: dict[frozenset[str], Callable[[nn.Module, str, Any], Dense | str]] = {
    frozenset({"query", "key", "value"}): _separate,
    frozenset({"c_attn", "c_proj"}): _fused,
    frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}): _grouped,
    frozenset({"qkv", "proj"}): _vision,
}

__all__ = [
    "CONVENTIONS",
    "NARROWED",
    "Dense",
    "Ordered",
    "Part",
    "PickedPairs",
    "Subspaces",
    "dense_attention",
    "narrowed",
    "set_matrix_",
]

"""One forward as data flow: which operator made which tensor from which, in which module, with which parameters.

The trace (`layerwise.trace`) knows modules; residual branches and attention heads are inside them, between operators. A tensor
is a *node*: a number that its views share and that changes when it is written to. No tensor is held longer than the model holds
it: a node is looked up by address and size, and whatever an operator makes takes the address over.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise import trees
from layerwise.data import Batch
from layerwise.trace import evaluating, multiply_accumulates, run, unfused
from layerwise.trees import Path

# what only moves, copies or casts elements
LAYOUT = frozenset(
    f"aten::{name}"
    for name in (
        "view", "_unsafe_view", "reshape", "transpose", "permute", "t", "clone", "contiguous", "_to_copy", "squeeze", "unsqueeze",
        "alias", "detach", "flatten", "unflatten", "expand", "copy_",
    )
)  # fmt: skip
MATRIX = frozenset({"aten::addmm", "aten::mm", "aten::linear", "aten::bmm", "aten::matmul", "aten::baddbmm"})


@dataclass(frozen=True)
class Use:
    """A parameter read by an operator. `inputs_first`: the matrix was multiplied as it lies, (inputs, outputs)."""

    name: str
    parameter: Tensor
    inputs_first: bool


@dataclass(eq=False)
class Step:
    """One operator. `width` is the size of the last dimension of what it read first, `heads` of how many heads that consists."""

    name: str
    tick: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    elements: tuple[int, ...]
    module: nn.Module
    uses: tuple[Use, ...]
    macs: int
    width: int = 0
    heads: int = 0


@dataclass(eq=False)
class Visit:
    """One call of a module: the nodes that it took and gave, with their keys and shapes."""

    module: nn.Module
    began: int
    takes: list[tuple[Path, int, tuple[int, ...]]]
    gives: list[tuple[Path, int, tuple[int, ...]]] = field(default_factory=list)
    ended: int = 0


@dataclass
class Flow:
    """What was recorded inside the chosen modules, in order."""

    steps: list[Step] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)


def read_flow(module: nn.Module, batch: Batch, inside: Iterable[nn.Module]) -> Flow:
    """Runs `module` once on `batch`, in eval mode and without gradients, and records what happens in the modules `inside`."""
    recorder = _Recorder(module, frozenset(inside))
    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(unfused())
        for part in module.modules():
            stack.callback(part.register_forward_pre_hook(recorder.enter, with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(recorder.leave, with_kwargs=True).remove)
        stack.enter_context(recorder)
        run(module, batch)
    return recorder.flow


class _Recorder(TorchDispatchMode):
    def __init__(self, root: nn.Module, inside: frozenset[nn.Module]) -> None:
        super().__init__()
        self.flow = Flow()
        self.inside = inside
        self.open: list[Visit] = []
        self.within = 0  # how many of the open modules are of those to look into
        self.tick = 0
        self.nodes: dict[tuple[int, int], int] = {}
        self.count = 0
        self.softmax: set[int] = set()  # attention weights
        self.mixed: dict[int, Tensor] = {}  # node → what the heads gave, (rows, heads, positions, features)
        self.parameters = {_key(p): (name, p) for name, p in root.named_parameters()}
        self.storages = {p.untyped_storage().data_ptr(): (name, p) for name, p in root.named_parameters()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see layerwise.trace: otherwise the first call imports the compiler

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.within += module in self.inside
        self.tick += 1
        self.open.append(Visit(module, self.tick, self._seen((args, kwargs))))
        if self.within:
            self.flow.visits.append(self.open[-1])

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.tick += 1
        visit = self.open.pop()
        visit.ended, visit.gives = self.tick, self._seen(output)
        self.within -= module in self.inside
        if not self.within:
            self.mixed.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.within:
            return func(*args, **(kwargs or {}))
        entering = [t for _, t in trees.tensors((args, kwargs or {})) if t.numel()]
        known = {_key(t): self._node(t) for t in entering if self._parameter(t) is None}
        uses = tuple(self._use(func._schema.name, t) for t in entering if self._parameter(t) is not None)
        result = func(*args, **(kwargs or {}))
        self._record(func, entering, known, uses, (args, kwargs or {}), result)
        return result

    def _record(self, func: Any, entering: list[Tensor], known: dict[Any, int], uses: Any, called: Any, result: Any) -> None:
        leaving = [t for _, t in trees.tensors(result) if t.numel() and t.is_floating_point()]
        changed = [t for t in leaving if func._schema.is_mutable or (_key(t) not in known and self._parameter(t) is None)]
        if not changed:
            return  # a view
        self.tick += 1
        reads = tuple(known[_key(t)] for t in entering if _key(t) in known)
        writes = tuple(self._fresh(t) for t in changed)
        data = [t for t in entering if _key(t) in known]
        step = Step(
            func._schema.name,
            self.tick,
            reads,
            writes,
            tuple(t.numel() for t in data),
            self.open[-1].module,
            uses,
            multiply_accumulates(func, called[0], called[1], result),
            data[0].shape[-1] if data and data[0].dim() else 0,
        )
        self._follow_heads(step, data, changed)
        self.flow.steps.append(step)

    def _follow_heads(self, step: Step, data: list[Tensor], changed: list[Tensor]) -> None:
        """Keeps what the attention's heads gave until a projection takes it, and compares: is the input head after head?"""
        if "scaled_dot_product" in step.name and changed[0].dim() == 4:
            self.mixed[step.writes[0]] = changed[0]
        elif "softmax" in step.name and changed[0].dim() == 4:
            self.softmax.add(step.writes[0])
            self.heads = changed[0].shape[1]
        elif step.name in LAYOUT and step.reads and step.reads[0] in self.softmax:
            self.softmax.add(step.writes[0])
        elif step.name in MATRIX and self.softmax & set(step.reads) and not step.uses:
            out = changed[0]
            if out.dim() == 3 and out.shape[0] % self.heads == 0:
                self.mixed[step.writes[0]] = out.unflatten(0, (-1, self.heads))
        elif step.name in LAYOUT and step.reads and step.reads[-1] in self.mixed:
            self.mixed[step.writes[0]] = self.mixed[step.reads[-1]]
        elif step.name in MATRIX and step.uses and step.reads and step.reads[-1] in self.mixed:
            step.heads = _head_after_head(self.mixed[step.reads[-1]], data[-1])

    def _use(self, operator: str, tensor: Tensor) -> Use:
        found = self._parameter(tensor)
        assert found is not None  # the caller has asked
        name, parameter = found
        as_it_lies = operator != "aten::linear" and tensor.shape == parameter.shape and tensor.stride() == parameter.stride()
        return Use(name, parameter, as_it_lies)

    def _parameter(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        return self.parameters.get(_key(tensor)) or self.storages.get(tensor.untyped_storage().data_ptr())

    def _node(self, tensor: Tensor) -> int:
        return self.nodes[_key(tensor)] if _key(tensor) in self.nodes else self._fresh(tensor)

    def _fresh(self, tensor: Tensor) -> int:
        self.count += 1
        self.nodes[_key(tensor)] = self.count
        return self.count

    def _seen(self, tree: Any) -> list[tuple[Path, int, tuple[int, ...]]]:
        floats = [(path, t) for path, t in trees.tensors(tree) if t.numel() and t.is_floating_point()]
        return [(path, self._node(t), tuple(t.shape)) for path, t in floats]


def _key(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _head_after_head(mixed: Tensor, entering: Tensor) -> int:
    """The number of heads whose outputs (rows, heads, positions, features) stand side by side in `entering`; 0 if they do not."""
    _, heads, _, features = mixed.shape
    if entering.shape[-1] != heads * features or entering.numel() != mixed.numel():
        return 0
    for order in ((0, 2, 1, 3), (2, 0, 1, 3)):  # samples first, or positions first
        if torch.equal(mixed.permute(order).reshape(-1, heads * features), entering.reshape(-1, heads * features)):
            return heads
    return 0


__all__ = ["LAYOUT", "MATRIX", "Flow", "Step", "Use", "Visit", "read_flow"]

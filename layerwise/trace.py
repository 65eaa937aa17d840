"""One forward pass seen as a tree of module calls: who ran in whom, what went in and out, which operators, how many MACs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from layerwise import trees
from layerwise.data import Batch
from layerwise.errors import LayerwiseError, UserModelError
from layerwise.trees import Path

Seen = tuple[Path, tuple[int, ...], int, torch.dtype]  # path, shape, identity of the memory, type


@dataclass(eq=False)
class Call:
    """One call of a module. `order` is the moment it began; `gives`/`takes` are memory identities of its tensors."""

    name: str
    module: nn.Module
    order: int
    inputs: list[Seen] = field(default_factory=list)
    outputs: list[Seen] = field(default_factory=list)
    children: list[Call] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)
    macs: int = 0
    parameters: int = 0
    matrices: int = 0

    @property
    def parent_path(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def takes(self) -> frozenset[int]:
        return frozenset(key for _, _, key, dtype in self.inputs if dtype.is_floating_point)

    @property
    def gives(self) -> frozenset[int]:
        return frozenset(key for _, _, key, dtype in self.outputs if dtype.is_floating_point)

    @property
    def in_shape(self) -> tuple[int, ...]:
        return next((shape for _, shape, _, dtype in self.inputs if dtype.is_floating_point), ())

    @property
    def out_shape(self) -> tuple[int, ...]:
        return next((shape for _, shape, _, dtype in self.outputs if dtype.is_floating_point), ())

    def walk(self) -> Iterator[Call]:
        """This call and all within, in the order in which they began."""
        yield self
        for child in self.children:
            yield from child.walk()


class _Operators(TorchDispatchMode):
    """Notes each operator and its multiply-accumulates on every module call that is open."""

    def __init__(self, stack: list[Call]) -> None:
        super().__init__()
        self.stack = stack

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps the method below so that its first call imports torch._dynamo: seconds, for nothing.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        macs = multiply_accumulates(func, args, kwargs or {}, result)
        name = func._schema.name
        for call in self.stack:
            call.operators.add(name)
            call.macs += macs
        return result


def multiply_accumulates(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """MACs of one operator call: half of torch's FLOP formula; attention on CPU, which torch does not know, by its shapes."""
    if "scaled_dot_product" in func._schema.name:
        query, key, value = args[:3]
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        return int(pairs * (query.shape[-1] + value.shape[-1]))
    if func._schema.name == "aten::_int_mm":  # the product of 8-bit integers, which torch does not count either
        return int(args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result)) // 2


class _Tracer:
    """Hooks that build the tree. Holds on to every tensor it saw, so that memory identities stay unique."""

    def __init__(self, module: nn.Module) -> None:
        self.names = {m: name for name, m in module.named_modules()}
        self.stack: list[Call] = []
        self.root: Call | None = None
        self.held: list[Tensor] = []
        self.calls = 0

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(self.names[module], module, self.calls, inputs=self._see((args, kwargs)))
        unique = {id(p): p for p in module.parameters()}
        call.parameters = sum(p.numel() for p in unique.values())
        call.matrices = sum(p.dim() > 1 for p in unique.values())
        self.calls += 1
        if self.stack:
            self.stack[-1].children.append(call)
        else:
            self.root = call
        self.stack.append(call)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.stack.pop().outputs = self._see(output)

    def _see(self, tree: Any) -> list[Seen]:
        found = list(trees.tensors(tree))
        self.held.extend(t for _, t in found)
        return [(path, tuple(t.shape), _identity(t), t.dtype) for path, t in found]


def _identity(tensor: Tensor) -> int:
    """Equal for a tensor and its reshapes: their data start at one address and count the same elements."""
    return hash((tensor.data_ptr(), tensor.numel())) if tensor.numel() else id(tensor)


def traced(module: nn.Module, batch: Batch) -> Call:
    """The call tree of one forward in eval mode without gradients. Raises `UserModelError` (LW-U73) when the forward raises."""
    tracer = _Tracer(module)
    with evaluating(module), torch.no_grad(), unfused(), _uncompiled(), _hooked(module, tracer), _Operators(tracer.stack):
        run(module, batch)
    if tracer.root is None:
        raise UserModelError("The model's forward was never called.", code="LW-U76")
    return tracer.root


@contextmanager
def _hooked(module: nn.Module, tracer: _Tracer) -> Iterator[None]:
    handles = []
    try:
        for m in tracer.names:
            handles.append(m.register_forward_pre_hook(tracer.enter, with_kwargs=True))
            handles.append(m.register_forward_hook(tracer.leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unfused() -> Iterator[None]:
    """nn.TransformerEncoderLayer's fused fast path calls none of its submodules: off inside, so that they can be seen."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """A compiled module runs as it was written: its compiler would try to compile the hooks as well."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled yet, and asking would import it
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own train flag is put back afterwards."""
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training


def run(module: nn.Module, batch: Batch) -> Any:
    """``module(*args, **kwargs)``; whatever the user's code raises comes out as `UserModelError` with file and line."""
    try:
        args, kwargs = batch.arguments()
        return module(*args, **kwargs)
    except LayerwiseError:
        raise
    except RuntimeError as error:
        if out_of_memory(error):  # the engines answer this by smaller batches
            raise
        raise _failed(module, error) from error
    except Exception as error:
        raise _failed(module, error) from error


def out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception of its own; the CPU allocator raises a plain RuntimeError that only its text tells apart."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "DefaultCPUAllocator" in text)
    )


def _failed(module: nn.Module, error: Exception) -> UserModelError:
    frame = error.__traceback__
    place = ""
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if "/torch/nn/modules/module.py" not in file and "/layerwise/trace.py" not in file and "/torch/" not in file:
            place = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return UserModelError(
        f"The forward of {type(module).__name__} raised {type(error).__name__}: {error}",
        place=place,
        remedy="Call the model on one batch by hand to see the full traceback, or use --debug.",
        code="LW-U73",
    )

"""One forward pass seen as a tree of module calls: who ran in whom, what went in and out, which operators, how many MACs.

It also runs on tensors without data (``torch.device("meta")``), so that a model too big to run can be read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise import trees
from layerwise.data import Batch
from layerwise.errors import LayerwiseError, UserModelError
from layerwise.trees import Path

Seen = tuple[Path, tuple[int, ...], int, torch.dtype]  # path, shape, identity of the memory, type


class Use(Enum):
    """What a run reads a parameter for."""

    TABLE = "looked up, added or scales; never multiplied with data as a matrix"
    WEIGHT = "multiplied with data, and what comes of it with another parameter"
    HEAD = "multiplied with data last, for the output"


@dataclass(eq=False)
class Call:
    """One call of a module. `order` and `ended` are moments; `gives`/`takes` are memory identities of its tensors."""

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
    ended: int = 0
    uses: dict[Tensor, Use] = field(default_factory=dict)  # of the whole run, noted on its root: the parameters that were read

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
    """Notes each operator and its multiply-accumulates on every module call that is open, and which parameters are read."""

    def __init__(self, tracer: _Tracer, reading: Reading) -> None:
        super().__init__()
        self.tracer = tracer
        self.reading = reading

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps the method below so that its first call imports torch._dynamo: seconds, for nothing.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        macs = multiply_accumulates(func, args, kwargs or {}, result)
        name = func._schema.name
        for call in self.tracer.stack:
            call.operators.add(name)
            call.macs += macs
        self.reading.note((args, kwargs or {}), result, multiplies=macs > 0 or "rnn" in name)
        return result


class Reading:
    """What each parameter is read for, also through views and through tensors made of parameters alone (a scaled weight).

    Products with parameters are numbered. Each tensor's history is the set of those that it was computed from, kept as the bits
    of an integer: a product that is in no other's history gives the output.
    """

    def __init__(self, module: nn.Module) -> None:
        self.made_of: dict[int, frozenset[Tensor]] = {}  # storage → the parameters in it, or that it was made of
        self.history: dict[int, int] = {}  # storage → products
        self.products: dict[
            Tensor, int
        ] = {}  # parameter → those that took it; 0 for one that was only looked up, added or scaled
        self.count, self.taken_on = 0, 0
        for parameter in module.parameters():
            key = storage_of(parameter)
            self.made_of[key] = self.made_of.get(key, frozenset()) | {parameter}
        self.lasting = frozenset(self.made_of)

    def note(self, entering: Any, leaving: Any, *, multiplies: bool) -> None:
        """One operator's call: what it took and gave, and whether it multiplies."""
        keys = [storage_of(tensor) for _, tensor in trees.tensors(entering)]
        sources = frozenset[Tensor]().union(*(self.made_of[key] for key in keys if key in self.made_of))
        pure = bool(keys) and all(key in self.made_of for key in keys)
        history = 0
        for key in keys:
            history |= self.history.get(key, 0)
        product = 0
        if multiplies and sources and not pure:
            product = 1 << self.count
            self.count += 1
            self.taken_on |= history
        for parameter in sources:
            self.products[parameter] = self.products.get(parameter, 0) | product
        for _, tensor in trees.tensors(leaving):
            self._made(storage_of(tensor), sources if pure else frozenset(), history | product)

    def _made(self, key: int, sources: frozenset[Tensor], history: int) -> None:
        """Memory may be used again for something else: what it held before is forgotten."""
        self.history[key] = history
        if key in self.lasting:
            return
        if sources:
            self.made_of[key] = sources
        else:
            self.made_of.pop(key, None)

    def uses(self) -> dict[Tensor, Use]:
        """Parameter → use, for those that were read."""
        return {parameter: self._use(products) for parameter, products in self.products.items()}

    def _use(self, products: int) -> Use:
        if not products:
            return Use.TABLE
        return Use.WEIGHT if products & self.taken_on else Use.HEAD


def storage_of(tensor: Tensor) -> int:
    """Equal for all views of one memory, also where there is no data (meta tensors)."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


RECURRENT = {"aten::mkldnn_rnn_layer": slice(1, 3), "aten::_cudnn_rnn": slice(1, 2), "aten::miopen_rnn": slice(1, 2)}  # weights


def multiply_accumulates(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """MACs of one operator call: half of torch's FLOP formula; what torch does not know (attention, recurrence) by its shapes."""
    if "scaled_dot_product" in func._schema.name:
        query, key, value = args[:3]
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        return int(pairs * (query.shape[-1] + value.shape[-1]))
    if func._schema.name == "aten::_int_mm":  # the product of 8-bit integers, which torch does not count either
        return int(args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
    if func._schema.name in RECURRENT:  # each matrix meets each step of each sequence once
        weights = [t for _, t in trees.tensors(args[RECURRENT[func._schema.name]]) if t.dim() == 2]
        return int(math.prod(args[0].shape[:-1]) * sum(w.numel() for w in weights))
    from torch.utils.flop_counter import flop_registry  # loads Triton where it is installed: 90 MB

    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result)) // 2


class _Tracer:
    """Hooks that build the tree. Holds on to every tensor it saw, so that memory identities stay unique."""

    def __init__(self, module: nn.Module) -> None:
        self.names = {m: name for name, m in module.named_modules()}
        self.stack: list[Call] = []
        self.root: Call | None = None
        self.held: list[Tensor] = []
        self.now = 0  # grows with each call that begins or ends

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.now += 1
        call = Call(self.names[module], module, self.now, inputs=self._see((args, kwargs)))
        unique = {id(p): p for p in module.parameters()}
        call.parameters = sum(p.numel() for p in unique.values())
        call.matrices = sum(is_matrix(p) for p in unique.values())
        if self.stack:
            self.stack[-1].children.append(call)
        else:
            self.root = call
        self.stack.append(call)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.now += 1
        call = self.stack.pop()
        call.outputs, call.ended = self._see(output), self.now

    def _see(self, tree: Any) -> list[Seen]:
        found = list(trees.tensors(tree))
        self.held.extend(t for _, t in found)
        return [(path, tuple(t.shape), _identity(t), t.dtype) for path, t in found]


def _identity(tensor: Tensor) -> int:
    """Equal for a tensor and its reshapes: their data start at one place of one memory and count the same elements."""
    return hash((storage_of(tensor), tensor.storage_offset(), tensor.numel())) if tensor.numel() else id(tensor)


def traced(module: nn.Module, batch: Batch) -> Call:
    """The call tree of one forward in eval mode without gradients. Raises `UserModelError` (LW-U73) when the forward raises."""
    tracer, reading = _Tracer(module), Reading(module)
    with (
        evaluating(module),
        torch.no_grad(),
        unfused(),
        _uncompiled(),
        _hooked(module, tracer),
        _dataless(module, batch) as given,
        _Operators(tracer, reading),
    ):
        run(module, given)
    if tracer.root is None:
        raise UserModelError("The model's forward was never called.", code="LW-U76")
    tracer.root.uses = reading.uses()
    return tracer.root


@contextmanager
def _dataless(module: nn.Module, batch: Batch) -> Iterator[Batch]:
    """For a module without data, the batch as fake tensors: libraries ask a fake mask nothing that only data can answer."""
    if not any(p.is_meta for p in module.parameters()):
        yield batch
        return
    from torch._subclasses import FakeTensorMode  # seconds of imports that no other model needs

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield batch.map(lambda tensor: mode.from_tensor(tensor.to("meta")))


def is_matrix(parameter: Tensor) -> bool:
    """Two dimensions, or more of which two count: a scale per channel of shape (channels, 1, 1) is a vector."""
    return parameter.dim() == 2 or sum(size > 1 for size in parameter.shape) > 1


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

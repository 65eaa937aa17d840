"""Stacked recurrent nets as chains of single layers.

``nn.LSTM(num_layers=3)`` is one module that computes three layers in one call: none of them can be seen, skipped or dropped.
`unstacked` gives a twin in which each is a module of its own. Decisions:

- The twin shares every parameter and buffer with the original, so it costs no memory and a weight changed in one is changed in
  both.
- The final hidden state is read from what leaves each layer, not from the layer's own report: a layer that is skipped passes its
  input on there as well. The cell state of an LSTM is known to the layer alone, which gives it beside its output.
- Only modules that are exactly torch's are exchanged; a subclass, or one with parametrized weights, may compute something else.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

STACKED = (nn.LSTM, nn.GRU, nn.RNN)
State = Tensor | tuple[Tensor, Tensor]


def stacked_names(module: nn.Module) -> list[str]:
    """The dotted paths of the recurrent nets inside `module` that have several layers and can be taken apart."""
    return [name for name, part in module.named_modules(remove_duplicate=False) if _can_be_unstacked(part)]


def unstacked(module: nn.Module) -> nn.Module:
    """A twin of `module` whose stacked recurrent nets are `Unstacked`; `module` itself where it has none.

    Its outputs in eval mode are those of `module`. In training mode the dropout between layers draws its own masks.
    """
    names = stacked_names(module)
    if not names:
        return module
    twin = copy.deepcopy(module, {id(t): t for t in _tensors(module)})
    made: dict[nn.Module, Unstacked] = {}
    for name in names:
        part = twin.get_submodule(name)
        assert isinstance(part, nn.RNNBase)  # that is how the names were chosen
        if part not in made:
            made[part] = Unstacked(part)
        if not name:
            return made[part]
        twin.set_submodule(name, made[part])
    return twin


class Unstacked(nn.Module):
    """What `net` computes, in its form: ``(output, h_n)``, of an LSTM ``(output, (h_n, c_n))``; `layers` are single layers.

    Takes padded or packed sequences, batched or not, with or without an initial state, as `net` does.
    """

    def __init__(self, net: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.bias, self.batch_first, self.dropout = net.mode, net.bias, net.batch_first, net.dropout
        self.input_size, self.hidden_size, self.num_layers = net.input_size, net.hidden_size, net.num_layers
        self.bidirectional, self.proj_size = net.bidirectional, net.proj_size
        self.layers = nn.ModuleList(SingleLayer(net, k) for k in range(net.num_layers))
        self.train(net.training)

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Any, State]:
        hidden: list[Tensor] = []
        cells: list[Tensor] = []
        stream: Any = input
        for k, layer in enumerate(self.layers):
            if k and self.dropout and self.training:
                stream = _dropped(stream, self.dropout)
            stream = layer(stream, self._initial(hx, k))
            if self.mode == "LSTM":
                stream, cell = stream
                cells.append(cell)
            hidden.append(self._last(stream))
        last = torch.cat(hidden)
        return stream, (last, torch.cat(cells)) if self.mode == "LSTM" else last

    def flatten_parameters(self) -> None:
        """For code that asks its recurrent net to lay its weights out anew, which concerns CUDA alone."""
        for net in (part for part in self.modules() if isinstance(part, nn.RNNBase)):
            net.flatten_parameters()

    def _initial(self, hx: State | None, layer: int) -> State | None:
        directions = 1 + self.bidirectional
        rows = slice(layer * directions, (layer + 1) * directions)
        if hx is None or isinstance(hx, Tensor):
            return None if hx is None else hx[rows]
        return hx[0][rows], hx[1][rows]

    def _last(self, output: Tensor | PackedSequence) -> Tensor:
        """The final hidden state, (directions, samples, features), or without samples: each direction ends at another end."""
        if isinstance(output, PackedSequence):
            ends = _packed_ends(output)
        else:
            time = 1 if self.batch_first and output.dim() == 3 else 0
            ends = output.select(time, -1), output.select(time, 0)
        if not self.bidirectional:
            return ends[0][None]
        half = ends[0].shape[-1] // 2
        return torch.stack([ends[0][..., :half], ends[1][..., half:]])


class SingleLayer(nn.Module):
    """Layer `index` of a stacked net, on the net's own parameters. Gives its output; an LSTM's ``(output, cell state)``."""

    def __init__(self, net: nn.RNNBase, index: int) -> None:
        super().__init__()
        width = (net.proj_size or net.hidden_size) * (1 + net.bidirectional) if index else net.input_size
        settings: dict[str, Any] = {"bias": net.bias, "batch_first": net.batch_first, "bidirectional": net.bidirectional}
        if isinstance(net, nn.LSTM):
            settings["proj_size"] = net.proj_size
        if isinstance(net, nn.RNN):
            settings["nonlinearity"] = net.nonlinearity
        kind: Any = type(net)  # each of the three takes other arguments than their base
        self.net: nn.RNNBase = kind(width, net.hidden_size, 1, device="meta", **settings)
        for name in [name for name, _ in self.net.named_parameters()]:
            setattr(self.net, name, getattr(net, name.replace("_l0", f"_l{index}")))
        self.net.flatten_parameters()

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> Any:
        output, state = self.net(input, hx)
        return (output, state[1]) if isinstance(state, tuple) else output


def _can_be_unstacked(module: nn.Module) -> bool:
    if type(module) not in STACKED or module.num_layers < 2:  # type: ignore[operator]  # these have it
        return False
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return own == set(module._flat_weights_names)  # type: ignore[arg-type]  # else a weight is computed from another


def _tensors(module: nn.Module) -> list[Tensor]:
    """Everything that the twin shares: parameters, buffers and tensors kept as plain attributes."""
    inside = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return [*module.parameters(), *module.buffers(), *inside]


def _dropped(stream: Any, share: float) -> Any:
    if isinstance(stream, PackedSequence):
        return stream._replace(data=nn.functional.dropout(stream.data, share))
    return nn.functional.dropout(stream, share)


def _packed_ends(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """The last and the first step of each sequence, (samples, features), in the order in which the user gave them."""
    sizes = packed.batch_sizes
    starts = torch.cumsum(sizes, 0) - sizes
    samples = torch.arange(int(sizes[0]))
    lengths = (sizes[None, :] > samples[:, None]).sum(1)
    places = (starts[lengths - 1] + samples).to(packed.data.device)
    last, first = packed.data[places], packed.data[: len(samples)]
    if packed.unsorted_indices is None:
        return last, first
    return last[packed.unsorted_indices], first[packed.unsorted_indices]


__all__ = ["SingleLayer", "Unstacked", "stacked_names", "unstacked"]

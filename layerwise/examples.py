"""A small batch made from nothing, for modules that say what they read.

A model of transformers does: by the names of its forward's arguments, by `main_input_name` and by its configuration. What those
leave open (is a spectrogram ``(bins, frames)`` or ``(frames, bins)``?) is settled by trying: candidates are run in order, the
likeliest first. No names of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise import trees
from layerwise.data import Batch
from layerwise.errors import LayerwiseError
from layerwise.trace import evaluating, run

SAMPLES, TOKENS, ANSWER = 2, 16, 8  # two samples, so that what mixes them shows; tokens of a text and of a decoder's
FRAMES = 128  # of a spectrogram where the configuration names no length
WAVE = 8000  # half a second at 16 kHz: enough for the strides of every encoder of waves
SIDES = (64, 224)  # of images where the configuration names none
CHANNELS = ("num_channels", "in_channels", "in_chans", "num_input_channels")
BINS = ("num_mel_bins", "feature_size", "input_feat_per_channel", "mel_bins", "num_mel_channels", "input_dim")
LENGTHS = ("max_source_positions", "max_length", "spec_size")  # frames, or half of them behind a convolution of stride 2
OPTIONAL = ("use_cache",)  # a cache would be one more output that grows
MASKS = ("attention_mask",)
UNNAMED = 2**31


def example_of(module: nn.Module) -> Batch | None:
    """The first candidate on which the forward runs and gives a floating-point tensor; None where there is none."""
    for batch in candidates(module):
        if failure(module, batch) is None:
            return batch
    return None


def failure(module: nn.Module, batch: Batch) -> str | None:
    """Why the forward does not run on `batch`, in words; None where it does."""
    try:
        with torch.no_grad(), evaluating(module):
            output = run(module, batch)
    except (LayerwiseError, RuntimeError) as error:  # a RuntimeError here is memory
        return str(getattr(error, "what", error))
    if not any(t.is_floating_point() for _, t in trees.tensors(output)):
        return f"the forward gave {type(output).__name__} without a floating-point tensor"
    return None


def candidates(module: Any) -> Iterator[Batch]:
    """What may suit, the likeliest first: few arguments before many, and of each argument its forms in turn."""
    if not hasattr(module, "config") or not hasattr(module, "main_input_name"):
        return
    known = inspect.signature(type(module).forward).parameters
    fixed = {name: False for name in OPTIONAL if name in known}
    for names in _choices(module, known):
        forms = [(name, list(_forms(module, name))) for name in names]
        for turn in range(max((len(values) for _, values in forms), default=0)):
            picked = {name: values[min(turn, len(values) - 1)] for name, values in forms if values}
            yield Batch((), {**picked, **fixed})


def _choices(module: Any, known: Mapping[str, inspect.Parameter]) -> list[tuple[str, ...]]:
    """Sets of arguments to give: what must be given; with the decoder's; with the other modalities'; with all that is known."""
    plain = [n for n, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD and n != "self"]
    main = module.main_input_name
    mains = [main] if isinstance(main, str) else list(main)
    needed = [n for n in plain if known[n].default is inspect.Parameter.empty or n in mains]
    needed += [n for n in MASKS if n in known and "input_ids" in needed]
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in known else []
    others = [n for n in ("input_ids", *MASKS, "pixel_values", "input_features", "input_values") if n in known]
    sets = [needed, needed + decoder, needed + others, needed + others + decoder, [n for n in plain if n in MAKERS]]
    if getattr(module.config, "is_encoder_decoder", False):  # some answer without, from what they were given shifted
        sets = sets[1:2] + sets
    return list(dict.fromkeys(tuple(dict.fromkeys(names)) for names in sets))


def _forms(module: Any, name: str) -> Iterable[Any]:
    for pattern, make in MAKERS.items():
        if name == pattern:
            return make(module)
    return next((make(module) for ending, make in ENDINGS.items() if name.endswith(ending)), [])


def setting(config: Any, names: Sequence[str], kind: type | tuple[type, ...] = int) -> Any:
    """The first of these settings in the configuration or, breadth first, in those nested in it; None where none is there."""
    level = [config]
    while level:
        for name in names:
            for one in level:
                value = vars(one).get(name)
                if isinstance(value, kind) and not isinstance(value, bool):
                    return value
        level = [v for one in level for v in vars(one).values() if hasattr(v, "model_type")]
    return None


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def table_of(module: Any) -> nn.Module | None:
    """The table of tokens; None where the model does not say which module that is."""
    try:
        found: nn.Module = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # several tables, or none: characters that are hashed
        return None
    return found


def tokens_of(module: Any) -> int:
    """The rows of the table of tokens; without one the configuration's vocabulary."""
    weight = getattr(table_of(module), "weight", None)
    return setting(module.config, ("vocab_size",)) or 2 if weight is None else int(weight.shape[0])


def _vocabulary(module: Any) -> int:
    """How many tokens can be both read and answered: the table may have rows for what is no token."""
    return min(setting(module.config, ("vocab_size",)) or UNNAMED, tokens_of(module))


def _special(config: Any) -> tuple[set[int], list[int]]:
    """Every id with a meaning in the configuration and those nested in it, and those that end a text."""
    ids, ends, level = set(), [], [config]
    while level:
        for key, value in ((k, v) for one in level for k, v in vars(one).items() if k.endswith(("token_id", "token_index"))):
            found = [i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int)]
            ids.update(found)
            ends += found if key == "eos_token_id" else []
        level = [v for one in level for v in vars(one).values() if hasattr(v, "model_type")]
    return ids, ends


def _ids(module: Any, length: int = TOKENS) -> Tensor:
    """Random tokens without a special meaning; the last ends the text, as some classifiers demand."""
    vocabulary = _vocabulary(module)
    special, ends = _special(module.config)
    plain = [i for i in range(min(vocabulary, 4096)) if i not in special] or [0]
    ids = torch.tensor(plain)[torch.randint(len(plain), (SAMPLES, length), generator=_random())]
    end = next((i for i in ends if 0 <= i < vocabulary), None)
    if end is not None:
        ids[:, -1] = end
    return ids


def _side(module: Any) -> list[tuple[int, int]]:
    found = setting(module.config, ("image_size", "img_size", "input_size"), (int, list, tuple, dict))
    if isinstance(found, dict):
        edge = found.get("shortest_edge", found.get("longest_edge", SIDES[0]))
        found = (found.get("height", edge), found.get("width", edge))
    own = [] if found is None else [tuple(found)[-2:] if isinstance(found, list | tuple) else (found, found)]
    return [*own, *((side, side) for side in SIDES)]


def _images(module: Any) -> list[Tensor]:
    """(samples, channels, height, width) in the configuration's size, else in two others."""
    channels = setting(module.config, CHANNELS) or 3
    return [_noise(module, channels, height, width) for height, width in _side(module)]


def _videos(module: Any) -> list[Tensor]:
    """(samples, frames, channels, height, width)."""
    frames = setting(module.config, ("num_frames", "frames_per_clip")) or 2
    return [_noise(module, frames, *image.shape[1:]) for image in _images(module)]


def _spectrograms(module: Any) -> list[Tensor]:
    """(samples, bins, frames) and (samples, frames, bins), of the configuration's length, twice that, and one of ours."""
    own = setting(module.config, LENGTHS)
    lengths = [*((2 * own, own) if own and own <= 4096 else ()), FRAMES]
    widths = dict.fromkeys([setting(module.config, BINS) or 80, _entrance(module)])
    return [_noise(module, *shape) for bins in widths if bins for n in lengths for shape in ((bins, n), (n, bins))]


def _entrance(module: nn.Module) -> int:
    """What the first linear layer takes: some models read frames that were stacked for them; 0 without such a layer."""
    return next((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), 0)


def _waves(module: Any) -> list[Tensor]:
    """(samples, points), with a channel between, or a spectrogram under the same name."""
    spectrograms = _spectrograms(module) if setting(module.config, BINS) else []
    return [_noise(module, WAVE), *spectrograms[::-1], _noise(module, 1, WAVE)]


def _anything(module: Any) -> list[Tensor]:
    """``inputs``: what is read depends on the model's preprocessor, so tokens first, then images, then sound."""
    length = setting(module.config, ("max_position_embeddings",)) or TOKENS
    return [_ids(module), _ids(module, length), *_images(module), *_waves(module)]


def _noise(module: Any, *shape: int) -> Tensor:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(SAMPLES, *shape, generator=_random()).to(dtype)


def _boxes(module: Any) -> list[Tensor]:
    """(samples, tokens, 4): corners from 0 to 1000, as layout models read them; (samples, 1, 4) for prompts."""
    return [torch.tensor([1, 2, 30, 40]).expand(SAMPLES, TOKENS, 4).contiguous()]


def _ones(length: int) -> Callable[[Any], list[Tensor]]:
    return lambda module: [torch.ones(SAMPLES, length, dtype=torch.long)]


MAKERS: Mapping[str, Callable[[Any], Sequence[Any]]] = {
    "input_ids": lambda module: [_ids(module)],
    "decoder_input_ids": lambda module: [_ids(module, ANSWER)],
    "attention_mask": _ones(TOKENS),
    "decoder_attention_mask": _ones(ANSWER),
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "pixel_mask": lambda module: [torch.ones(image.shape[0], *image.shape[2:], dtype=torch.long) for image in _images(module)],
    "input_features": _spectrograms,
    "input_values": _waves,
    "inputs": _anything,
    "bbox": _boxes,
}
ENDINGS: Mapping[str, Callable[[Any], Sequence[Any]]] = {
    "input_ids": lambda module: [_ids(module)],
    "_inputs": lambda module: [_ids(module, setting(module.config, ("task_seq_len",)) or TOKENS)],
    "attention_mask": _ones(TOKENS),
}

__all__ = ["candidates", "example_of", "failure", "setting", "table_of", "tokens_of"]

"""Small versions of transformers' configurations, from the default one: by the names and types of its settings, for no model in
particular.

Every width, in all nested configurations, is divided by one power of two, and so are head counts as far as they allow: products
and ratios between settings (heads times head size, a text width that an image projector must meet) then stay as they were.
Depths, vocabularies, image sides, expert and query counts are capped. What depends on them (indices of layers, ids of special
tokens) follows. Where the result does not build or run, `STEPS` are the next ones to try.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """How far to shrink. `least`: the smallest main width must stay at or above it; `image`: the largest side, None as it was."""

    least: int = 24
    stages: int = 2  # layers of each stage, where there are several
    depth: int = 8  # fewer, and what is no layer (convolutions before an encoder) would weigh too much
    image: int | None = 64
    vocabulary: int | None = 512
    positions: int | None = 512
    queries: int | None = 8
    heads: bool = True  # divide head counts too, not only the size of a head
    derived: bool = False  # hand over, cut to size, also what the class would work out by itself
    fill: bool = False  # give a value to what some defaults leave open and models need


STEPS = (
    Step(),
    Step(image=None, stages=3),
    Step(least=32, heads=False),
    Step(least=32, fill=True),
    Step(derived=True),
    Step(least=64),
    Step(least=64, image=None),
    Step(least=128, image=128),
    Step(least=128, positions=None, queries=None, vocabulary=None),
    Step(least=256, image=None, positions=None, fill=True),
    Step(least=128, depth=32, image=None, queries=None),
)

DEPTH = re.compile(
    r"(^|_)(n|num)_.*(layers?|blocks)$|^(n_)?(layers?|blocks|depths?|layer_depth|num_layers|n_blocks)$"
    r"|_(layers|depth|depths|blocks)$"
)
NO_DEPTH = re.compile(
    r"conv_pos|feature_layer|levels|group|taps|moe_layers|mtp|nextn|shared|skip|adapter|dense_layers|replace|mem"
)
HEADS = re.compile(r"(^|_)(heads?|n_head|num_kv|n_groups|num_head|groups)$|num_.*heads(_.*)?$|^n_heads?$|_heads$")
HEAD_SIZE = re.compile(r"head_dim|head_size|dim_head|d_kv|kv_channels|rope_head|rotary_dim|nope|headdim|d_head|v_head")
VOCABULARY = re.compile(r"vocab|n_token|num_embeddings|codebook_size|audio_codebook")
TOKEN = re.compile(r"(token|_id|_index|_idx|_ids|token_ids)$")
IMAGE = re.compile(r"^(image|img|input)_size$|^(image|input)_resolution$|^(spec|pretrained_image)_size$")
MAP = re.compile(r"feature_sizes$|image_embedding_size$")  # sides of maps of features
EXPERTS = re.compile(r"(num|n)_.*experts$|^(num|n)_experts$|^moe_num_experts$")
CHOSEN = re.compile(r"experts_per_tok|^(moe_)?top_?k$|^moe_k$|num_experts_per|experts_top_k|router_top_k|num_selected")
EXPERT_GROUPS = re.compile(r"^n_group$|topk_group|num_expert_group")
QUERIES = re.compile(r"queries|num_query|two_stage_num_proposals|num_proposals|num_latents")
POSITIONS = re.compile(
    r"position_embeddings$|positions$|^n_ctx$|max_seq(uence)?_len(gth)?$|^max_(source|target)_pos|relative_positions$"
)
WIDTH = re.compile(
    r"hidden|dim|width|channel|inner|ffn|rank|feature|planes|embed|^d_|_d_|intermediate|size|d_ff|d_model|inter|latents|filters"
)
CHUNK = re.compile(r"(^|mamba_|ssm_|scan_)chunk_size(_|$)")  # of scans, which pad a text to whole chunks
NO_WIDTH = re.compile(
    r"vocab|image|img|patch|kernel|position|length|token|window|stride|chunk|frames?|sampling_rate|sample_rate|samples|bins?|"
    r"block_size|resolution|mel|hop|"
    r"theta|labels|type_vocab|^num_(hidden_)?layers|layers|group|levels|ratio|bucket|points|"
    r"num_|^n_|pool_size|feat_size|memory_size|grid|cache|max_|min_|buffer|segment|spatial|shape|scale|logit|loss|tubelet|seq|"
    r"input_size|output_size|conv_size|_std|factor|expan|time|context|merge"
)
MAIN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "hidden_sizes", "embed_dims", "dims", "hidden_dim")


@dataclass
class Plan:
    """One shrinking: the step, the divisor of widths, and the old → new ids of special tokens."""

    step: Step
    divisor: int
    sides: int = 1  # divisor of images' sides
    ids: dict[int, int] = field(default_factory=dict)
    vocabulary: int = 0


def steps(config_class: Any, said: list[str]) -> Iterator[Any]:
    """Shrunk configurations, the smallest first, equal ones once; why the class refused others is added to `said`."""
    seen: set[str] = set()
    for step in STEPS:
        try:
            config = shrunk(config_class(), step)
        except Exception as error:  # a validator of the class can raise anything; the next step keeps more of the default
            said.append(" ".join(str(error).split())[:200])
            continue
        text = config.to_json_string(use_diff=False)
        if text not in seen:
            seen.add(text)
            yield config


def shrunk(config: Any, step: Step) -> Any:
    """A small configuration of the same class. Raises whatever the class raises on values that do not fit."""
    nodes = list(_nodes(config))
    vocabularies = [v for node in nodes for k, v in vars(node).items() if VOCABULARY.search(k) and _whole(v) and v >= 64]
    cap = min([*vocabularies, step.vocabulary or math.inf])
    sides = max((v for node in nodes for k, v in vars(node).items() if IMAGE.search(k) and _whole(v)), default=0)
    shorter = max(sides // step.image, 1) if step.image and sides else 1
    plan = Plan(step, _divisor(nodes, step.least), shorter, vocabulary=0 if cap == math.inf else int(cap))
    return _rebuilt(config, plan)


def _nodes(config: Any) -> Iterator[Any]:
    """The configuration and all nested in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from _nodes(value)


def _divisor(nodes: Sequence[Any], least: int) -> int:
    """The largest power of two that leaves every main width at or above `least`, and no width in a list below a third of it."""
    named = [(key, value) for node in nodes for key, value in vars(node).items()]
    mains = [value for key, value in named if key in MAIN and _whole(value) and value >= 16]
    listed = [v for key, value in named if isinstance(value, list | tuple) for v in _numbers(value) if _is_width(key, v)]
    room = min([value / least for value in mains] + [3 * value / least for value in listed], default=1.0)
    return 2 ** max(0, int(math.log2(max(room, 1.0))))


def _rebuilt(config: Any, plan: Plan) -> Any:
    """The class called anew with the settings that it declares, so that what it derives from them is derived again."""
    plain = _declared(config, plan.step)
    values: dict[str, Any] = {}
    heads = _head_divisor(plain, plan)
    old = max((v for k, v in plain.items() if _is_depth(k, v, plain)), default=0)
    for key, value in plain.items():
        nested = hasattr(value, "model_type")
        values[key] = _rebuilt(value, plan) if nested else _small(key, value, plain, plan, heads, old)
    if plan.step.fill:
        values |= {k: v for k, v in _open(values).items() if k in values and values[k] is None}
    small = type(config)(**values)
    for key, value in vars(config).items():  # what a class keeps without declaring it
        if not key.startswith("_") and key not in vars(small):
            setattr(small, key, value)
    return small


def _open(values: Mapping[str, Any]) -> dict[str, Any]:
    """What some defaults leave open although the model needs it."""
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    sizes = {"head_dim": width // heads} if heads and width else {}
    return {"vocab_size": 512, "num_experts_per_tok": 2, "num_experts": 4, "n_routed_experts": 4, **sizes}


def _declared(config: Any, step: Step) -> dict[str, Any]:
    """The settings that the class declares, as given: None where the class would work the same value out by itself."""
    cls = type(config)
    known = {f.name: f.default for f in fields(cls) if not f.name.startswith("_")} if is_dataclass(cls) else {}
    fresh = _fresh(cls)
    found = {}
    properties = {k: getattr(config, k) for k in ("out_features", "out_indices") if hasattr(config, k)}
    given = {**known, **properties, **vars(config)}  # not by getattr: what differs between layers refuses to be read so
    for key in (*known, *properties):
        value = given[key]
        if key in {"transformers_version", "dtype"}:
            continue
        numbers = known.get(key) is None and isinstance(value, int | float | list | tuple)
        derived = numbers and not step.derived and value == fresh.get(key, fresh.get(f"_{key}"))
        if key in known or not derived:
            found[key] = None if derived and not TOKEN.search(key) else value
    if found.get("out_indices") is not None:
        found.pop("out_features", None)  # the same places by names, which would not follow the depth
    return found


def _fresh(cls: Any) -> Mapping[str, Any]:
    """The settings of the default configuration; none where the class has none."""
    try:
        return vars(cls())
    except Exception:  # nested parts may be required
        return {}


def _small(key: str, value: Any, plain: Mapping[str, Any], plan: Plan, heads: int, old: int) -> Any:
    """What `value` becomes, by the name of its setting and its type."""
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    if isinstance(value, dict):
        return _inside(value, max(plan.divisor // heads, 1), plan)
    if isinstance(value, list | tuple):
        return _list(key, value, plain, plan, heads, old)
    if not isinstance(value, int):
        return value
    return _number(key, value, plain, plan, heads)


def _number(key: str, value: int, plain: Mapping[str, Any], plan: Plan, heads: int) -> int:
    step = plan.step
    if TOKEN.search(key):
        return _token(value, plan)
    if VOCABULARY.search(key):
        return min(value, step.vocabulary or value) if value >= 64 else value
    if _is_depth(key, value, plain):
        return min(value, step.depth)
    if IMAGE.search(key):
        return _image(value, plain, step)
    if MAP.search(key):
        return max(value // plan.sides, 1)
    for pattern, most in (
        (EXPERTS, 4),
        (CHOSEN, 2),
        (EXPERT_GROUPS, 1),
        (CHUNK, 16),
        (QUERIES, step.queries),
        (POSITIONS, step.positions),
    ):
        if pattern.search(key):
            return min(value, most) if most else value
    if HEAD_SIZE.search(key):
        return max(value // max(plan.divisor // heads, 1), 2) if value >= 8 else value
    if HEADS.search(key) and value < 256:  # groups of so many are channels by themselves
        return max(value // heads, 1) if value % heads == 0 else value
    if _is_width(key, value):
        return -(-value // plan.divisor // 4) * 4  # whole fours, which some kernels want
    return value


def _is_width(key: str, value: int) -> bool:
    """A size of features: what has fewer than 16 is a factor, or the colours of an image."""
    return value >= 16 and (
        key in MAIN or bool(WIDTH.search(key) and not NO_WIDTH.search(key)) or (key.endswith("groups") and value >= 256)
    )


def _list(key: str, value: Sequence[Any], plain: Mapping[str, Any], plan: Plan, heads: int, old: int) -> Any:
    if not value or not all(_whole(v) for v in value):
        nested = [_part(key, v, plain, plan, heads, old) for v in value]
        cut = nested[: plan.step.depth] if old and len(value) == old and all(isinstance(v, str) for v in value) else nested
        return _like(value, cut)
    if re.search(r"ind(ex|ices|exes|ic)|_idxs?$|_layers$|layers?_ids?$", key) and old:
        return _like(value, _indices(value, old, min(old, plan.step.depth)))
    if DEPTH.search(key):
        return _like(value, [min(v, plan.step.stages) for v in value])
    return _like(value, [_number(key, v, plain, plan, heads) for v in value])


def _part(key: str, value: Any, plain: Mapping[str, Any], plan: Plan, heads: int, old: int) -> Any:
    """An entry of a mixed list: a list again, or how often a pattern repeats."""
    if isinstance(value, list | tuple):
        return _list(key, value, plain, plan, heads, old)
    repeats = _whole(value) and value > 1 and old > plan.step.depth and old % value == 0
    return max(value * plan.step.depth // old, 1) if repeats else value


def _like(value: Sequence[Any], items: list[Any]) -> Any:
    """A list where `value` is one, else a tuple."""
    return items if isinstance(value, list) else tuple(items)


def _indices(value: Sequence[int], old: int, new: int) -> list[int]:
    """Positions among `old` layers as positions among `new`, in order and each once where they were."""
    if max(value) <= new - 1:
        return list(value)
    top = [min(new - 1, int(v * new / max(old, max(value) + 1))) for v in value]
    return sorted(set(top)) if len(set(top)) < len(top) and len(top) > new else top


def _inside(value: Mapping[str, Any], divisor: int, plan: Plan) -> dict[str, Any]:
    """Dictionaries of a configuration: rotary sections are parts of a head; labels and the like stay."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found[key] = _inside(inner, divisor, plan)
        elif "section" in str(key) and isinstance(inner, list | tuple):
            found[key] = [max(v // divisor, 1) for v in inner]
        else:
            found[key] = inner
    return found


def _is_depth(key: str, value: Any, plain: Mapping[str, Any]) -> bool:
    """A count of layers, unless it counts the entries of a list that stays (strides of a stack of convolutions)."""
    counts = any(isinstance(v, list | tuple) and len(v) == value and all(_whole(x) for x in v) for v in plain.values())
    return _whole(value) and value > 1 and bool(DEPTH.search(key)) and not NO_DEPTH.search(key) and not counts


def _image(value: int, plain: Mapping[str, Any], step: Step) -> int:
    """At most the step's side, and whole patches: four of them where a patch is larger than a quarter of that."""
    patch = max(_numbers(plain.get("patch_size")), default=1)
    if step.image is None or value <= step.image:
        return value
    return max(step.image // patch, 4) * patch if patch <= step.image else value


def _head_divisor(plain: Mapping[str, Any], plan: Plan) -> int:
    """The largest power of two up to the widths' that divides every head count and leaves the main ones two heads."""
    if not plan.step.heads:
        return 1
    counts = [v for k, value in plain.items() if HEADS.search(k) and not DEPTH.search(k) for v in _numbers(value) if 1 < v < 256]
    if not counts:
        return 1
    common = math.gcd(*counts)
    divisor = min(plan.divisor, common & -common)
    while divisor > 1 and max(counts) // divisor < 2:
        divisor //= 2
    return divisor


def _token(value: int, plan: Plan) -> int:
    """The id itself where the small vocabulary has it, else one from its end, the same for the same id everywhere."""
    if not plan.vocabulary or 0 <= value < plan.vocabulary // 2 or value < 0:
        return value
    return plan.ids.setdefault(value, plan.vocabulary - 1 - len(plan.ids))


def _numbers(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if _whole(v)]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["STEPS", "Step", "shrunk", "steps"]

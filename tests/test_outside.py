"""What lies in no layer as a row of the table: what stands in, what it costs under a cast, and that no uniform choice wins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from layerwise.compress.half_embeddings import HalfEmbeddings
from layerwise.compress.half_precision import HalfPrecision
from layerwise.compress.half_weights import HalfWeights
from layerwise.compress.packed_embeddings import PackedEmbeddings
from layerwise.compress.weight_only import WeightOnly
from layerwise.data import Batch, Data
from layerwise.method import CompressionMethod, apply_plan, method_of, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.planner import Planner
from layerwise.planning.blocks import build, bytes_of
from layerwise.planning.effects import Meter
from layerwise.planning.outside import REST, outside
from layerwise.target import Target
from layerwise.task import Classification, LanguageModelling
from layerwise.tensors import byte_size

BITS: list[CompressionMethod] = [WeightOnly(8, 8), WeightOnly(4, 8), HalfWeights()]
TABLES: list[CompressionMethod] = [HalfEmbeddings(), PackedEmbeddings(8, 8), PackedEmbeddings(4, 8)]


def subject() -> tuple[UniversalModel, Data]:
    """A small GPT-2 whose token table is its head and half of its bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=600, n_positions=16, bos_token_id=0, eos_token_id=0)
    module = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 600, (32, 8), generator=torch.Generator().manual_seed(1))
    data = Data.of([Batch((), {"input_ids": x, "attention_mask": torch.ones_like(x)}) for x in ids.split(16)])
    return UniversalModel(module, task=LanguageModelling(), example=data[0]), data


def damage(meter: Meter, *steps: tuple[CompressionMethod, list[str]]) -> tuple[float, int]:
    """For real, and the bytes."""
    plan = CompressionPlan(tuple(step_of(m, names) for m, names in steps))
    changed = apply_plan(meter.model, plan).model
    return meter.compared(changed).damage, byte_size(changed.module)


def test_parameters_that_stand_in_give_what_the_method_does_and_leave_the_model_alone() -> None:
    """Fails where a tied head keeps the old table, or a layer answers from a cache made before the table changed."""
    model, data = subject()
    meter, names, before = Meter(model, data), [x.name for x in model.layers], model.fingerprint
    (block,) = build(model, [PackedEmbeddings(4, 8)], [REST]).values()
    layers = build(model, [WeightOnly(4, 8)], names[:1])
    found = meter.effects(layers, [{REST: block}, {}])
    both = damage(meter, (WeightOnly(4, 8), names[:1]), (PackedEmbeddings(4, 8), names))[0]
    assert found[0].damage == pytest.approx(both, rel=1e-4)
    assert found[1].damage == pytest.approx(damage(meter, (WeightOnly(4, 8), names[:1]))[0], rel=1e-4)
    held = meter.effects({**layers, REST: block}, [{}])[0]
    assert held.damage == pytest.approx(both, rel=1e-4)
    assert model.fingerprint == before
    assert bytes_of({REST: block}) < 0.2 * byte_size(model.module)


def test_what_changes_a_layer_or_more_than_parameters_is_no_such_row() -> None:
    model, _ = subject()
    for method in (HalfPrecision("bfloat16"), WeightOnly(8, 8)):
        changed = apply_plan(model, CompressionPlan((step_of(method, [x.name for x in model.layers]),))).model
        assert outside(model, changed) is None


def test_the_table_knows_the_bytes_of_every_combination() -> None:
    model, data = subject()
    planner = Planner(model, None, [], data, [*BITS, *TABLES, HalfPrecision("bfloat16")])
    planner.ladder([Target.parse("size<=0.5x")])
    assert [type(m).name for w in planner.wholes for m in w.methods] == ["half_precision"]
    names = [x.name for x in model.layers]
    for whole, rest in itertools.product(planner.wholes, [None, *TABLES[:2]]):
        label = "keep" if rest is None else next(k for k, a in planner.table.actions.items() if a.methods == (rest,))
        chosen = {**dict.fromkeys(names, "weight_only(bits=8, group=8)"), REST: label}
        half = "half_weights" in whole.on(planner.table).entries[names[0]]
        assert half == (not whole.methods)  # under a cast there is nothing left to store in 16 bits, and it would be refused
        steps = planner.table.steps(model, chosen, whole.methods)
        real = byte_size(apply_plan(model, CompressionPlan(steps)).model.module)
        told = whole.on(planner.table).total(chosen, "size")
        assert real <= told + 1
        assert told <= real * 1.15, (whole.methods, rest)  # biases of packed layers count as if nothing were cast there


def best_uniform(planner: Planner, limit: float) -> float:
    """The least damage of any uniform choice within the bytes, each carried out for real."""
    names, found = [x.name for x in planner.model.layers], []
    for bits, table in itertools.product([None, *BITS], [None, *TABLES]):
        chosen = [(m, names) for m in (bits, table) if m is not None]
        nats, size = damage(planner.meter, *chosen)
        found += [nats] if size <= limit else []
    return min(found)


@pytest.mark.parametrize("budget", [0.4, 0.3])
def test_the_plan_is_never_worse_than_the_best_uniform_choice_and_uses_the_bytes(budget: float) -> None:
    """Fails where tables are chosen apart from the layers, and the sum of two damages is taken for that of both."""
    model, data = subject()
    planner = Planner(model, None, [], data, [*BITS, *TABLES], forwards=40)
    plan = planner.choose([Target.parse(f"size<={budget}x")])
    limit = budget * byte_size(model.module)
    found, size = damage(planner.meter, *[(method_of(s), list(s.layers)) for s in plan.steps])
    assert size <= limit
    assert found <= best_uniform(planner, limit) * (1 + 1e-6)
    assert size >= 0.9 * limit


class Cancelling(nn.Module):
    """Blocks that add the same once, once, and −2 times, so that equal rounding errors cancel and single ones do not."""

    class Block(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.sign, self.own = sign, nn.Linear(16, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.sign * self.own(torch.ones_like(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Cancelling.Block, (1.0, 1.0, -2.0)))
        for block in self.blocks:
            block.load_state_dict({"own.weight": torch.randn(16, 16, generator=torch.Generator().manual_seed(0))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, :5]


def test_where_damages_do_not_add_up_the_uniform_choices_are_measured_as_starts() -> None:
    """Fails where starts are the solver's alone: the sums put 3 bits on the heaviest block, and 2 bits everywhere cancel."""
    inputs = [torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    module = Cancelling().eval()
    data = Data.of([Batch((x,), {}, module(x).argmax(-1)) for x in inputs])
    model = UniversalModel(module, task=Classification(), example=data[0])
    planner = Planner(model, None, [], data, [WeightOnly(3, 8), WeightOnly(2, 8)])
    plan = planner.choose([Target.parse("size<=0.157x")])  # one block of three may have 3 bits
    names, label = [x.name for x in model.layers], "weight_only(bits=2, group=8)"
    assert planner.table.damage(dict.fromkeys(names, label)) > 1e-3
    starts = {tuple(s["actions"].get(n, "keep") for n in names): s["damage"] for s in plan.evidence["starts"]}
    assert starts[(label,) * 3] < 1e-9 < min(d for key, d in starts.items() if key != (label,) * 3)
    assert damage(planner.meter, *[(method_of(s), list(s.layers)) for s in plan.steps])[0] < 1e-9

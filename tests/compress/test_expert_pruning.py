"""Whole experts: the cut model computes what a slow replica does whose router never had them, and a wrong cut is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from layerwise.compress.structured_pruning import StructuredPruning
from layerwise.coupling import coupled_experts
from layerwise.coupling.choice import frequencies
from layerwise.coupling.slicing import read
from layerwise.data import Batch, Data
from layerwise.errors import UsageError
from layerwise.method import Applied, apply_plan, step_of
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan
from layerwise.proofs import judged, relative_error
from layerwise.result import Proof
from layerwise.saved import load_saved, save_model
from layerwise.supplies import Supplies
from tests.models import CASES, tokens

WIDTH, EXPERTS = 8, 6


class Listed(nn.Module):
    """x + Σ gate·expert(x) over the two experts of six that a router with a bias chooses, or over all (`soft`)."""

    def __init__(self, soft: bool = False) -> None:
        super().__init__()
        self.soft, self.chosen, self.count = soft, 2, EXPERTS
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, WIDTH)) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        if self.soft:
            return x + sum(shares[..., i, None] * self.experts[i](x) for i in range(self.count))
        weights, indices = shares.topk(self.chosen, -1)
        out = x.clone()
        for i in range(self.count):
            place, slot = torch.where(indices == i)
            out[place] += weights[place, slot, None] / weights.sum(-1)[place, None] * self.experts[i](x[place])
        return out


def own(soft: bool = False) -> UniversalModel:
    torch.manual_seed(0)
    module = nn.Sequential(Listed(soft), Listed(soft), nn.Linear(WIDTH, 3)).double().eval()
    return UniversalModel(module, example=Batch((torch.randn(9, WIDTH, dtype=torch.float64),), {}, torch.arange(9) % 3))


def deepseek(groups: int = 1) -> nn.Module:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    config = tf.DeepseekV3Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, n_group=groups, topk_group=1, use_cache=False,
        first_k_dense_replace=1, **sizes,  # type: ignore[arg-type]
    )  # fmt: skip
    module = tf.DeepseekV3ForCausalLM(config)
    for name, bias in module.named_buffers():
        if "correction" in name:
            bias.copy_(0.02 * torch.randn(len(bias)))
    return module


def fused(family: str) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "use_cache": False, "num_experts_per_tok": 2}  # fmt: skip
    if family == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=EXPERTS))
    return tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**sizes, num_experts=EXPERTS, moe_intermediate_size=24, shared_expert_intermediate_size=24)
    )


BUILD = {"mixtral": lambda: fused("mixtral"), "qwen2_moe": lambda: fused("qwen2_moe"), "deepseek_v3": deepseek}


def of(family: str) -> UniversalModel:
    torch.manual_seed(0)
    return UniversalModel(BUILD[family]().eval(), example=tokens()(2))


def pruned(model: UniversalModel, supplies: Supplies | None = None, **settings: Any) -> Applied:
    method = StructuredPruning(prune_type="expert", **settings)
    layers = [layer.name for layer in model.layers if not method.treats_in(model, layer)]
    return apply_plan(model, CompressionPlan((step_of(method, layers),)), supplies or Supplies())


def proof(model: UniversalModel, result: Applied) -> Proof:
    return judged(model, result.model, result.plan.steps[0], [model.example])


def gone(result: Applied) -> dict[str, list[int]]:
    return {name: read(entry[-1]) for name, entry in result.plan.steps[0].settings["groups"].items()}


def replica(block: Any, x: Tensor, without: list[int]) -> Tensor:
    """Token by token and expert by expert, over those that are left."""
    out = []
    for token in x:
        left = [i for i in range(EXPERTS) if i not in without]
        logits = {i: float(block.router.weight[i] @ token + block.router.bias[i]) for i in left}
        chosen = left if block.soft else sorted(left, key=lambda i: -logits[i])[:2]
        powers = {i: torch.tensor(logits[i], dtype=torch.float64).exp() for i in chosen}
        total = sum(powers.values())
        out.append(token + sum(powers[i] / total * block.experts[i](token) for i in chosen))
    return torch.stack(out)


@pytest.mark.parametrize("soft", [False, True])
def test_the_cut_computes_what_a_replica_without_them_computes(soft: bool) -> None:
    model = own(soft)
    result = pruned(model, ratio=0.5)
    module: Any = model.module
    x = model.example.args[0]
    with torch.no_grad():
        wanted = module[2](replica(module[1], replica(module[0], x, gone(result)["0.experts"]), gone(result)["1.experts"]))
        assert relative_error(result.model.module(x), wanted) < 1e-12
        assert relative_error(module(x), wanted) > 1e-3  # they were in use
    cut: Any = result.model.module
    assert (len(cut[0].experts), cut[0].count, cut[0].router.out_features, cut[0].router.bias.shape) == (3, 3, 3, (3,))
    assert proof(model, result).passed


def test_what_belongs_to_an_expert() -> None:
    """By hand: fused weights and the router's row of each; the correction of its score; of the model the numbers."""
    (found,) = coupled_experts(of("deepseek_v3")).groups
    home = "model.layers.1.mlp"
    names = ["experts.gate_up_proj", "experts.down_proj", "gate.weight", "gate.e_score_correction_bias"]
    assert [p.name for p in found.group.places] == [f"{home}.{n}" for n in names]
    assert all(p.indices.tolist() == [[i] for i in range(8)] and p.dim == 0 for p in found.group.places)
    assert {(f"{home}.gate", "num_experts"), (f"{home}.experts", "num_experts")} <= set(found.numbers)
    assert found.least == 2  # as many as are chosen


@pytest.mark.parametrize("family", BUILD)
def test_from_pretrained_loads_it_and_so_do_we(family: str, tmp_path: Path) -> None:
    model = of(family)
    result = pruned(model, ratio=0.5)
    assert proof(model, result).passed
    left = {"mixtral": 3, "qwen2_moe": 3, "deepseek_v3": 4}[family]
    save_model(result.model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    key = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "deepseek_v3": "n_routed_experts"}[family]
    module: Any = result.model.module
    assert config[key] == left == getattr(module.config, key)
    batch = tokens()(3)
    again: Any = type(module).from_pretrained(tmp_path / "model")
    assert relative_error(UniversalModel(again.eval()).predict(batch), result.model.predict(batch)) < 1e-6
    ours = load_saved(tmp_path / "model", module=BUILD[family]())
    assert torch.equal(ours.predict(batch), result.model.predict(batch))
    assert ours.fingerprint == result.model.fingerprint


def test_the_loss_of_balance_counts_the_experts_that_are_left() -> None:
    module: Any = pruned(of("mixtral"), ratio=0.5).model.module
    ids = tokens()(3).kwargs["input_ids"]
    found = module(input_ids=ids, labels=ids, output_router_logits=True)
    assert found.aux_loss.isfinite()
    assert found.router_logits[0].shape[-1] == module.num_experts == 3


def test_experts_that_differ_from_block_to_block_are_loaded_by_us_alone(tmp_path: Path) -> None:
    model = of("mixtral")
    result = pruned(model, groups={"model.layers.0.mlp.experts": ["1,4"]})
    assert proof(model, result).passed
    module: Any = result.model.module
    assert (module.num_experts, module.model.layers[0].mlp.gate.num_experts) == (EXPERTS, 4)
    save_model(result.model, tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()
    again = load_saved(tmp_path / "model", module=BUILD["mixtral"]())
    assert torch.equal(again.predict(tokens()(3)), result.model.predict(tokens()(3)))


def test_saved_lists_are_loaded_and_a_second_time_is_refused(tmp_path: Path) -> None:
    model = own()
    result = pruned(model, ratio=0.5)
    save_model(result.model, tmp_path / "model")
    again = load_saved(tmp_path / "model", module=own().module)
    assert torch.equal(again.predict(model.example), result.model.predict(model.example))
    step = result.plan.steps[0]
    with pytest.raises(UsageError, match="already"):
        apply_plan(model, CompressionPlan((step, step)))
    twice = pruned(result.model, ratio=1 / 3)
    assert proof(result.model, twice).passed


@pytest.mark.parametrize("fault", ["wrong expert", "wrong row of the router", "stale bias", "old number"])
def test_a_wrong_cut_is_found(fault: str) -> None:
    model = of("deepseek_v3")
    result = pruned(model, ratio=0.5)
    assert proof(model, result).passed
    old: Any = model.module.get_submodule("model.layers.1.mlp")
    new: Any = result.model.module.get_submodule("model.layers.1.mlp")
    (units,) = gone(result).values()
    with torch.no_grad():
        if fault == "wrong expert":
            new.experts.down_proj[0] = old.experts.down_proj[units[0]]
        elif fault == "wrong row of the router":
            new.gate.weight[0] = old.gate.weight[units[0]]
        elif fault == "stale bias":
            new.gate.e_score_correction_bias[0] = old.gate.e_score_correction_bias[units[0]]
        else:
            whole: Any = result.model.module
            whole.config.n_routed_experts = 8  # no output shows it
    found = proof(model, result)
    assert found.passed is False
    assert fault == "old number" or found.layer.startswith("model.layers.1")


def test_as_many_stay_as_the_router_chooses() -> None:
    model = own()
    result = pruned(model, ratio=0.95)
    assert [len(units) for units in gone(result).values()] == [EXPERTS - 2] * 2
    assert proof(model, result).passed
    with pytest.raises(UsageError, match="at least 2 must stay"):
        pruned(model, groups={"0.experts": ["0-4"]})


def test_where_parts_are_chosen_first_each_loses_as_many() -> None:
    torch.manual_seed(0)
    model = UniversalModel(deepseek(groups=2).eval(), example=tokens()(2))
    (found,) = coupled_experts(model).groups
    assert (found.step, found.parts, found.least) == (2, 2, 4)  # two are chosen in one part
    result = pruned(model, ratio=0.25)
    (units,) = gone(result).values()
    assert [u // 4 for u in units] == [0, 1]
    assert proof(model, result).passed
    with pytest.raises(UsageError, match="as many of each of the 2 equal parts"):
        pruned(model, groups={"model.layers.1.mlp.experts": ["0-1"]})


def test_experts_that_are_chosen_least_go_first() -> None:
    model = own()
    data = Data.of([Batch((torch.randn(n, WIDTH, dtype=torch.float64),), {}, torch.arange(n) % 3) for n in (30, 20)])
    groups = [t.group for t in coupled_experts(model).groups]
    found = frequencies(model, groups, data)["0.experts"]
    module: Any = model.module
    counts = [0] * EXPERTS
    for batch in data:
        for token in batch.args[0]:
            logits = (module[0].router.weight @ token + module[0].router.bias).tolist()
            for i in sorted(range(EXPERTS), key=lambda i: -logits[i])[:2]:
                counts[i] += 1
    assert found.tolist() == counts
    chosen = gone(pruned(model, Supplies(calibration=data), ratio=0.34, criterion="activation"))["0.experts"]
    assert chosen == sorted(sorted(range(EXPERTS), key=lambda i: counts[i])[:2])


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_an_expert_without_weights_goes_first(criterion: str) -> None:
    model = own()
    with torch.no_grad():
        block: Any = model.module.get_submodule("1")
        for p in block.experts[3].parameters():
            p.zero_()
        block.router.weight[3] *= 1e-3
        block.router.bias[3] *= 1e-3
    result = pruned(model, Supplies(calibration=Data.of([model.example])), ratio=1 / EXPERTS, criterion=criterion)
    assert gone(result)["1.experts"] == [3]


def test_without_a_router_it_is_refused_in_words() -> None:
    class Taken(nn.Module):
        """Each token has its expert by its place."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.stack([self.experts[i % EXPERTS] @ token for i, token in enumerate(x)])

    torch.manual_seed(0)
    module = nn.Sequential(Taken(), Taken(), nn.Linear(WIDTH, 3)).double().eval()
    model = UniversalModel(module, example=own().example)
    method = StructuredPruning(prune_type="expert")
    assert "no router was found that chooses between 6" in method.treats_in(model, model.layers[0])
    dense = CASES["llama"].model()
    assert "none of the type expert" in method.treats_in(dense, dense.layers[0])


def test_all_leaves_experts_whole() -> None:
    model = of("mixtral")
    result = apply_plan(model, CompressionPlan((step_of(StructuredPruning(0.5), [x.name for x in model.layers]),)))
    module: Any = result.model.module
    assert module.model.layers[0].mlp.gate.weight.shape == (EXPERTS, 32)
    assert module.model.layers[0].mlp.experts.down_proj.shape == (EXPERTS, 32, 24)

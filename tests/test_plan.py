"""`CompressionPlan`: exact round trips, a digest over what is done and not over why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import ConfigError
from layerwise.plan import Candidate, CompressionPlan, Step
from layerwise.target import Target

PLAN = CompressionPlan(
    steps=(Step("drop_layers", ("blocks.1", "blocks.3"), {}), Step("half_precision", ("blocks.0",), {"dtype": "float16"})),
    model="ab" * 32,
    targets=(Target.parse("size<=0.5x"), Target.parse("accuracy>=0.98x")),
    seed=3,
    before={"size": 1e6, "accuracy": 0.975},
    predicted={"size": 4.2e5, "accuracy": 0.9712345678901234},
    candidates=(Candidate((Step("half_precision", (), {}),), {"size": 5e5}, True),),
)

settings = st.dictionaries(
    st.text(min_size=1, max_size=8), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.booleans())
)
steps = st.builds(Step, st.text(max_size=12), st.lists(st.text(max_size=12), max_size=4).map(tuple), settings)
plans = st.builds(CompressionPlan, st.lists(steps, max_size=4).map(tuple), st.text(max_size=8), seed=st.integers(0, 2**31))


@given(plans)
def test_json_and_yaml_give_the_same_plan_back(plan: CompressionPlan) -> None:
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert CompressionPlan.from_yaml(plan.to_yaml()) == plan
    assert CompressionPlan.from_yaml(plan.to_yaml()).digest == plan.digest


def test_a_full_plan_survives_exactly() -> None:
    assert CompressionPlan.from_yaml(PLAN.to_yaml()) == PLAN
    assert hash(CompressionPlan.from_json(PLAN.to_json())) == hash(PLAN)


def test_the_digest_is_about_what_is_done() -> None:
    assert replace(PLAN, predicted={}, candidates=(), targets=()).digest == PLAN.digest
    assert replace(PLAN, steps=PLAN.steps[::-1]).digest != PLAN.digest
    assert replace(PLAN, model="other").digest != PLAN.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []", "the key 'format' is missing"),
        ("format: 99", "format 99, this version reads up to 1. Update layerwise"),
        ("format: 1", "incomplete: KeyError('steps')"),
        ("[1, 2]", "not a layerwise plan"),
        ("{", "Cannot read the plan"),
    ],
)
def test_files_that_are_no_plan_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        CompressionPlan.load(path)
    assert message in str(caught.value)

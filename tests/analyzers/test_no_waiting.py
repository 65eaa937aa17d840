"""No observing method makes the device wait for the host once per batch: nothing is read back while batches are fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.analyzer import ANALYZERS
from layerwise.feeding import Feeder
from layerwise.tasks import classification
from tests.models import CASES

OBSERVING = [name for name in sorted(ANALYZERS) if getattr(ANALYZERS[name]().statistic(CASES["vit"].model()), "needs", None)]
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}


class Reads(TorchDispatchMode):
    """Counts the operators that copy a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("subject", ["vit", "bert"])
@pytest.mark.parametrize("name", OBSERVING)
def test_nothing_is_read_back_while_a_batch_is_fed(name: str, subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        classification, "check_classes", lambda labels, classes: None
    )  # labels are asked on the host, before the copy
    case = CASES[subject]
    model, data = case.model(), case.data(4, 4, 4)
    model.see(data[0])
    feeder = Feeder(model, {name: ANALYZERS[name]().statistic(model)}, data, 0)
    feeder.feed(0)  # the first batch may ask, once
    with Reads() as own:  # what the model itself asks in its forward (transformers looks at the attention mask)
        model.predict(data[1])
    with Reads() as reads:
        feeder.feed(1)
    assert reads.found == own.found


def test_the_counter_notices() -> None:
    with Reads() as reads:
        float(torch.ones(3).sum())
    assert reads.found == ["aten::_local_scalar_dense"]
